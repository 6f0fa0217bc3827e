# ── The tutorial's variables, under their names ──────────────────────────────────────────────────────────────

variable "project_id" {
  type        = string
  description = "The Google Cloud project in which everything is made"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.project_id))
    error_message = "Not a project id: 6 to 30 lower-case letters, digits and hyphens. Did <PROJECT_ID> stay in the file?"
  }
}

variable "default_resource_name" {
  type        = string
  description = "The name, or the beginning of it, of whatever has no name of its own below"
  nullable    = false

  validation {
    # The longest that is appended is nine characters, and a service account's name ends at thirty.
    condition     = can(regex("^[a-z][a-z0-9-]{1,19}[a-z0-9]$", var.default_resource_name))
    error_message = "3 to 21 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "cluster_name" {
  type        = string
  description = "The cluster's name; empty: default_resource_name"
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$", var.cluster_name))
    error_message = "Empty, or up to 40 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "cluster_location" {
  type        = string
  description = "The cluster's region; a Standard cluster may stand in one zone instead"
  default     = "us-central1"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+(-[a-z])?$", var.cluster_location))
    error_message = "A region such as us-central1, or a zone such as us-central1-a."
  }

  validation {
    condition     = !var.autopilot_cluster || can(regex("^[a-z]+-[a-z]+[0-9]+$", var.cluster_location))
    error_message = "An Autopilot cluster needs a region, not a zone."
  }

  validation {
    condition     = startswith(var.cluster_location, var.subnetwork_region)
    error_message = "The cluster must stand in subnetwork_region."
  }
}

variable "private_cluster" {
  type        = bool
  description = "Without a public address for the control plane. Nodes never have one; kubectl goes by the DNS endpoint in either case"
  default     = true
  nullable    = false
}

variable "autopilot_cluster" {
  type        = bool
  description = "Autopilot; false: Standard, with a pool for the system and one for each of gpu_node_pools"
  default     = true
  nullable    = false
}

variable "network_name" {
  type        = string
  description = "The network's name; empty: default_resource_name"
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[a-z]([a-z0-9-]{0,43}[a-z0-9])?$", var.network_name))
    error_message = "Empty, or up to 45 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "subnetwork_name" {
  type        = string
  description = "The subnetwork's name; empty: default_resource_name"
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$", var.subnetwork_name))
    error_message = "Empty, or up to 63 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "subnetwork_region" {
  type        = string
  description = "The region of the subnetwork, the bucket and the image repository"
  default     = "us-central1"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.subnetwork_region))
    error_message = "A region such as us-central1."
  }
}

variable "subnetwork_cidr" {
  type        = string
  description = "The nodes' addresses"
  default     = "10.128.0.0/20"
  nullable    = false

  validation {
    condition     = can(cidrhost(var.subnetwork_cidr, 0)) && can(regex("/(1[0-9]|2[0-4])$", var.subnetwork_cidr))
    error_message = "An IPv4 range from /10 to /24, such as 10.128.0.0/20."
  }
}

variable "subnetwork_description" {
  type        = string
  description = "What the subnetwork says of itself"
  default     = "Part of the Metaflow on GKE installation"
  nullable    = false

  validation {
    condition     = length(var.subnetwork_description) <= 2048
    error_message = "At most 2048 characters."
  }
}

variable "service_account_name" {
  type        = string
  description = "The nodes' Google service account; empty: default_resource_name with -nodes"
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[a-z][a-z0-9-]{4,28}[a-z0-9]$", var.service_account_name))
    error_message = "Empty, or 6 to 30 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "bucket_name" {
  type        = string
  description = "What the bucket's name begins with, a random suffix follows; empty: default_resource_name"
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[a-z0-9][a-z0-9-]{1,52}[a-z0-9]$", var.bucket_name))
    error_message = "Empty, or 3 to 54 lower-case letters, digits and hyphens, no hyphen first or last."
  }
}

variable "metaflow_cloudsql_instance" {
  type        = string
  description = "What the database instance's name begins with, a random suffix follows; empty: default_resource_name"
  default     = ""
  nullable    = false

  validation {
    condition     = can(regex("^$|^[a-z][a-z0-9-]{0,59}[a-z0-9]$", var.metaflow_cloudsql_instance))
    error_message = "Empty, or 2 to 61 lower-case letters, digits and hyphens, a letter first and no hyphen last."
  }
}

variable "metaflow_cloudsql_instance_region" {
  type        = string
  description = "The database instance's region"
  default     = "us-central1"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z]+-[a-z]+[0-9]+$", var.metaflow_cloudsql_instance_region))
    error_message = "A region such as us-central1."
  }
}

variable "metaflow_kubernetes_namespace" {
  type        = string
  description = "The namespace of Metaflow's metadata service and UI"
  default     = "metaflow"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.metaflow_kubernetes_namespace))
    error_message = "A Kubernetes name: up to 63 lower-case letters, digits and hyphens."
  }

  validation {
    # Its policies deny what they do not allow, and its pods are restricted: no place for what is there already.
    condition     = !contains(["argo", "kube-system"], var.metaflow_kubernetes_namespace)
    error_message = "A namespace of its own: neither argo nor kube-system."
  }
}

variable "metaflow_kubernetes_service_account_name" {
  type        = string
  description = "The Kubernetes service account of the metadata service and the UI"
  default     = "metaflow-metadata"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.metaflow_kubernetes_service_account_name))
    error_message = "A Kubernetes name: up to 63 lower-case letters, digits and hyphens."
  }

  validation {
    condition     = var.metaflow_kubernetes_service_account_name != "default"
    error_message = "Not the default account: every pod of the namespace would have its rights."
  }
}

variable "metaflow_argo_workflows_sa_name" {
  type        = string
  description = "The Kubernetes service account, in the namespace argo, under which the steps of a flow run"
  default     = "metaflow-argo"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.metaflow_argo_workflows_sa_name))
    error_message = "A Kubernetes name: up to 63 lower-case letters, digits and hyphens."
  }

  validation {
    condition     = var.metaflow_argo_workflows_sa_name != "default"
    error_message = "Not the default account: every pod of the namespace would have its rights."
  }
}

# ── What the tutorial has no variable for ────────────────────────────────────────────────────────────────────

variable "deletion_protection" {
  type        = bool
  description = "Protects the cluster, the database, the bucket's contents and the secrets. The one switch to tear down: apply with false, then destroy"
  default     = true
  nullable    = false
}

variable "authorized_networks" {
  type        = map(string)
  description = "Networks that may reach the control plane by address, by display name; none: by the DNS endpoint only"
  default     = {}
  nullable    = false

  validation {
    condition     = alltrue([for cidr in values(var.authorized_networks) : can(cidrhost(cidr, 0))])
    error_message = "Each value must be a range such as 203.0.113.7/32."
  }

  validation {
    condition     = !anytrue([for cidr in values(var.authorized_networks) : endswith(cidr, "/0")])
    error_message = "A range of /0 is the whole internet."
  }
}

variable "pods_cidr" {
  type        = string
  description = "The pods' addresses"
  default     = "10.16.0.0/14"
  nullable    = false

  validation {
    condition     = can(cidrhost(var.pods_cidr, 0)) && can(regex("/(9|1[0-9]|2[01])$", var.pods_cidr))
    error_message = "An IPv4 range from /9 to /21, such as 10.16.0.0/14."
  }
}

variable "services_cidr" {
  type        = string
  description = "The addresses of Kubernetes services"
  default     = "10.20.0.0/20"
  nullable    = false

  validation {
    condition     = can(cidrhost(var.services_cidr, 0)) && can(regex("/(1[6-9]|2[0-7])$", var.services_cidr))
    error_message = "An IPv4 range from /16 to /27, such as 10.20.0.0/20."
  }
}

variable "private_services_prefix_length" {
  type        = number
  description = "The size of the range that Google picks for Cloud SQL"
  default     = 20
  nullable    = false

  validation {
    condition     = var.private_services_prefix_length >= 16 && var.private_services_prefix_length <= 24
    error_message = "From 16 to 24."
  }
}

variable "gpu_node_pools" {
  type = map(object({
    machine_type      = string
    accelerator_type  = string
    accelerator_count = optional(number, 1)
    node_locations    = list(string)
    max_nodes         = optional(number, 1)
    disk_size_gb      = optional(number, 200)
    spot              = optional(bool, false)
  }))
  description = "GPU pools of a Standard cluster, empty until a pod asks; Autopilot makes its own nodes and reads none of this"
  nullable    = false

  default = {
    l4 = {
      machine_type     = "g2-standard-16"
      accelerator_type = "nvidia-l4"
      node_locations   = ["us-central1-a"]
    }
    a100 = {
      machine_type     = "a2-highgpu-1g"
      accelerator_type = "nvidia-tesla-a100"
      node_locations   = ["us-central1-a"]
    }
  }

  validation {
    condition     = alltrue([for name in keys(var.gpu_node_pools) : can(regex("^[a-z0-9]([a-z0-9-]{0,34}[a-z0-9])?$", name))])
    error_message = "A pool's name: up to 36 lower-case letters, digits and hyphens."
  }

  validation {
    condition = var.autopilot_cluster || alltrue(flatten([
      for pool in values(var.gpu_node_pools) : [
        for zone in pool.node_locations : startswith(zone, "${var.subnetwork_region}-")
      ]
    ]))
    error_message = "Every node location must be a zone of subnetwork_region."
  }

  validation {
    condition = alltrue([
      for pool in values(var.gpu_node_pools) :
      length(pool.node_locations) > 0 && pool.max_nodes >= 1 && pool.accelerator_count >= 1 && pool.disk_size_gb >= 100
    ])
    error_message = "Each pool needs a zone, at least one node and one accelerator, and 100 GB of disk for the image."
  }
}

variable "metaflow_cloudsql_tier" {
  type        = string
  description = "The database's machine; the smallest does for one team's runs"
  default     = "db-f1-micro"
  nullable    = false

  validation {
    condition     = can(regex("^db-(f1-micro|g1-small|custom-[0-9]+-[0-9]+)$", var.metaflow_cloudsql_tier))
    error_message = "db-f1-micro, db-g1-small or db-custom-CPUS-MEGABYTES."
  }
}

variable "metaflow_db_user" {
  type        = string
  description = "The database user of the metadata service"
  default     = "metaflow-user"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z][a-z0-9_-]{0,62}$", var.metaflow_db_user)) && var.metaflow_db_user != "postgres"
    error_message = "Up to 63 lower-case letters, digits, hyphens and underscores, a letter first; not postgres."
  }
}

variable "metaflow_db_password_version" {
  type        = number
  description = "Raised by one, the next apply makes a new database password; the pods must be restarted to read it"
  default     = 1
  nullable    = false

  validation {
    condition     = var.metaflow_db_password_version >= 1 && floor(var.metaflow_db_password_version) == var.metaflow_db_password_version
    error_message = "A whole number from 1."
  }
}

variable "serving_kubernetes_namespace" {
  type        = string
  description = "The namespace of the model server and its gateway"
  default     = "serving"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.serving_kubernetes_namespace))
    error_message = "A Kubernetes name: up to 63 lower-case letters, digits and hyphens."
  }

  validation {
    condition     = !contains(["argo", "kube-system", var.metaflow_kubernetes_namespace], var.serving_kubernetes_namespace)
    error_message = "A namespace of its own: neither argo, kube-system nor metaflow_kubernetes_namespace."
  }
}

variable "serving_kubernetes_service_account_name" {
  type        = string
  description = "The Kubernetes service account of the model server"
  default     = "model-server"
  nullable    = false

  validation {
    condition     = can(regex("^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$", var.serving_kubernetes_service_account_name))
    error_message = "A Kubernetes name: up to 63 lower-case letters, digits and hyphens."
  }

  validation {
    condition     = var.serving_kubernetes_service_account_name != "default"
    error_message = "Not the default account: every pod of the namespace would have its rights."
  }
}

variable "checkpoint_retention_days" {
  type        = number
  description = "After how many days what lies under checkpoints/ in the bucket is deleted"
  default     = 30
  nullable    = false

  validation {
    condition     = var.checkpoint_retention_days >= 1 && floor(var.checkpoint_retention_days) == var.checkpoint_retention_days
    error_message = "A whole number of days from 1."
  }
}

variable "labels" {
  type        = map(string)
  description = "Further labels on everything that can carry them, for the bill"
  default     = {}
  nullable    = false

  validation {
    condition = alltrue([
      for key, value in var.labels :
      can(regex("^[a-z][a-z0-9_-]{0,62}$", key)) && can(regex("^[a-z0-9_-]{0,63}$", value))
    ])
    error_message = "Keys and values: up to 63 lower-case letters, digits, hyphens and underscores; a key starts with a letter."
  }
}
