# Two clusters of which one is built: Autopilot, or Standard with GPU pools. They are two resources because
# half of the arguments of one are refused by the other.
locals {
  cluster_name = var.cluster_name != "" ? var.cluster_name : var.default_resource_name
  cluster      = one(concat(google_container_cluster.autopilot[*], google_container_cluster.standard[*]))

  cluster_dns_endpoint = local.cluster.control_plane_endpoints_config[0].dns_endpoint_config[0].endpoint

  # GKE makes this pool of identities with the first cluster of a project.
  workload_pool = "${var.project_id}.svc.id.goog"
}

resource "google_container_cluster" "autopilot" {
  # checkov:skip=CKV_GCP_12: Autopilot always runs Dataplane V2, which enforces network policies
  # checkov:skip=CKV_GCP_61: intranode visibility cannot be set on Autopilot, which decides it itself
  # checkov:skip=CKV_GCP_65: RBAC by Google groups needs a Workspace domain, which a project need not have
  # checkov:skip=CKV_GCP_66: there is no attestor; images are pinned and come from our own registry
  # checkov:skip=CKV_GCP_69: Autopilot always runs GKE's metadata server
  count = var.autopilot_cluster ? 1 : 0

  project             = var.project_id
  name                = local.cluster_name
  location            = var.cluster_location
  description         = "Tuneship: fine-tuning, workflows and serving"
  enable_autopilot    = true
  deletion_protection = var.deletion_protection
  resource_labels     = local.labels

  network    = google_compute_network.main.id
  subnetwork = google_compute_subnetwork.main.id

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  release_channel {
    channel = "REGULAR"
  }

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = var.private_cluster
  }

  # By address, only these networks reach the control plane; none unless named.
  master_authorized_networks_config {
    gcp_public_cidrs_access_enabled = false

    dynamic "cidr_blocks" {
      for_each = var.authorized_networks

      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  # By name, whoever IAM allows does. kubectl and Helm go this way.
  control_plane_endpoints_config {
    dns_endpoint_config {
      allow_external_traffic = true
    }
  }

  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }

  # Nobody unknown gets further than the health endpoints, and no binding can change that.
  anonymous_authentication_config {
    mode = "LIMITED"
  }

  rbac_binding_config {
    enable_insecure_binding_system_unauthenticated = false
    enable_insecure_binding_system_authenticated   = false
  }

  cluster_autoscaling {
    auto_provisioning_defaults {
      service_account = google_service_account.nodes.email
      # What a node may do is decided by its account's roles, not by scopes.
      oauth_scopes = ["https://www.googleapis.com/auth/cloud-platform"]
    }
  }

  node_pool_auto_config {
    node_kubelet_config {
      insecure_kubelet_readonly_port_enabled = "FALSE"
    }
  }

  # Secrets are mounted as files from Secret Manager; none is a Kubernetes secret.
  secret_manager_config {
    enabled = true
  }

  security_posture_config {
    mode = "BASIC"
  }

  # Splits the bill by namespace.
  cost_management_config {
    enabled = true
  }

  timeouts {
    create = "45m"
    update = "45m"
    delete = "45m"
  }

  # Nodes that start without their rights or without a way out never become ready.
  depends_on = [
    google_artifact_registry_repository_iam_member.nodes_reader,
    google_compute_router_nat.main,
    google_project_iam_member.nodes,
    google_project_service.enabled,
  ]
}

resource "google_container_cluster" "standard" {
  # checkov:skip=CKV_GCP_12: Dataplane V2 enforces network policies; the older add-on cannot be on beside it
  # checkov:skip=CKV_GCP_65: RBAC by Google groups needs a Workspace domain, which a project need not have
  # checkov:skip=CKV_GCP_66: there is no attestor; images are pinned and come from our own registry
  count = var.autopilot_cluster ? 0 : 1

  project             = var.project_id
  name                = local.cluster_name
  location            = var.cluster_location
  description         = "Tuneship: fine-tuning, workflows and serving"
  deletion_protection = var.deletion_protection
  resource_labels     = local.labels

  network         = google_compute_network.main.id
  subnetwork      = google_compute_subnetwork.main.id
  networking_mode = "VPC_NATIVE"

  # A cluster is born with a pool; ours are resources of their own, so this one goes at once.
  remove_default_node_pool = true
  initial_node_count       = 1

  node_config {
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    metadata        = { disable-legacy-endpoints = "true" }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }
  }

  ip_allocation_policy {
    cluster_secondary_range_name  = "pods"
    services_secondary_range_name = "services"
  }

  release_channel {
    channel = "REGULAR"
  }

  private_cluster_config {
    enable_private_nodes    = true
    enable_private_endpoint = var.private_cluster
  }

  master_authorized_networks_config {
    gcp_public_cidrs_access_enabled = false

    dynamic "cidr_blocks" {
      for_each = var.authorized_networks

      content {
        display_name = cidr_blocks.key
        cidr_block   = cidr_blocks.value
      }
    }
  }

  control_plane_endpoints_config {
    dns_endpoint_config {
      allow_external_traffic = true
    }
  }

  master_auth {
    client_certificate_config {
      issue_client_certificate = false
    }
  }

  anonymous_authentication_config {
    mode = "LIMITED"
  }

  rbac_binding_config {
    enable_insecure_binding_system_unauthenticated = false
    enable_insecure_binding_system_authenticated   = false
  }

  workload_identity_config {
    workload_pool = local.workload_pool
  }

  # Dataplane V2: without it a network policy is an ornament.
  datapath_provider           = "ADVANCED_DATAPATH"
  enable_intranode_visibility = true
  enable_legacy_abac          = false
  enable_shielded_nodes       = true

  node_pool_defaults {
    node_config_defaults {
      insecure_kubelet_readonly_port_enabled = "FALSE"
    }
  }

  addons_config {
    gcs_fuse_csi_driver_config {
      enabled = true
    }
  }

  secret_manager_config {
    enabled = true
  }

  security_posture_config {
    mode = "BASIC"
  }

  cost_management_config {
    enabled = true
  }

  timeouts {
    create = "45m"
    update = "45m"
    delete = "45m"
  }

  depends_on = [
    google_artifact_registry_repository_iam_member.nodes_reader,
    google_compute_router_nat.main,
    google_project_iam_member.nodes,
    google_project_service.enabled,
  ]

  lifecycle {
    # The default pool is gone after creation: what it was made of is no drift.
    ignore_changes = [node_config, initial_node_count]
  }
}

# Argo, the metadata service and the gateway.
resource "google_container_node_pool" "system" {
  count = var.autopilot_cluster ? 0 : 1

  project  = var.project_id
  name     = "system"
  location = var.cluster_location
  cluster  = google_container_cluster.standard[0].name

  initial_node_count = 1

  autoscaling {
    total_min_node_count = 1
    total_max_node_count = 4
    location_policy      = "ANY"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = "e2-standard-4"
    image_type      = "COS_CONTAINERD"
    disk_type       = "pd-balanced"
    disk_size_gb    = 50
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    metadata        = { disable-legacy-endpoints = "true" }
    resource_labels = local.labels

    gcfs_config {
      enabled = true
    }

    kubelet_config {
      insecure_kubelet_readonly_port_enabled = "FALSE"
    }

    shielded_instance_config {
      enable_secure_boot          = true
      enable_integrity_monitoring = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }

  lifecycle {
    # The autoscaler moves it; without this a later plan would rebuild the pool.
    ignore_changes = [initial_node_count]
  }
}

# One pool a kind of GPU, empty until a pod asks for one. GKE taints these nodes, so that nothing else keeps
# them alive.
resource "google_container_node_pool" "gpu" {
  # checkov:skip=CKV_GCP_68: secure boot admits signed kernel modules only, and GKE installs the GPU's driver at boot
  for_each = var.autopilot_cluster ? {} : var.gpu_node_pools

  project        = var.project_id
  name           = "gpu-${each.key}"
  location       = var.cluster_location
  cluster        = google_container_cluster.standard[0].name
  node_locations = each.value.node_locations

  initial_node_count = 0

  autoscaling {
    total_min_node_count = 0
    total_max_node_count = each.value.max_nodes
    # Where there is a GPU to be had, not where the zones would be even.
    location_policy = "ANY"
  }

  management {
    auto_repair  = true
    auto_upgrade = true
  }

  node_config {
    machine_type    = each.value.machine_type
    image_type      = "COS_CONTAINERD"
    disk_type       = "pd-balanced"
    disk_size_gb    = each.value.disk_size_gb
    spot            = each.value.spot
    service_account = google_service_account.nodes.email
    oauth_scopes    = ["https://www.googleapis.com/auth/cloud-platform"]
    metadata        = { disable-legacy-endpoints = "true" }
    resource_labels = local.labels

    guest_accelerator {
      type  = each.value.accelerator_type
      count = each.value.accelerator_count

      gpu_driver_installation_config {
        gpu_driver_version = "DEFAULT"
      }
    }

    # A training image is several gigabytes: streamed, the pod starts before all of it is there.
    gcfs_config {
      enabled = true
    }

    gvnic {
      enabled = true
    }

    kubelet_config {
      insecure_kubelet_readonly_port_enabled = "FALSE"
    }

    shielded_instance_config {
      enable_secure_boot          = false
      enable_integrity_monitoring = true
    }

    workload_metadata_config {
      mode = "GKE_METADATA"
    }
  }

  lifecycle {
    ignore_changes = [initial_node_count]
  }
}
