provider "google" {
  project = var.project_id
  region  = var.subnetwork_region
}

# Helm speaks to the cluster through its DNS endpoint, which IAM guards: it works from a laptop although
# the control plane has no public address. A token comes from the plugin that kubectl uses too, when it is
# needed; a data source would leave one in the state.
provider "helm" {
  kubernetes = {
    host = "https://${local.cluster_dns_endpoint}"

    exec = {
      api_version = "client.authentication.k8s.io/v1beta1"
      command     = "gke-gcloud-auth-plugin"
      # The same identity that the google provider uses, not whoever gcloud is signed in as.
      args = ["--use_application_default_credentials"]
    }
  }
}

locals {
  # Every resource that can carry labels carries these: the bill can be split by them.
  labels = merge(var.labels, {
    app        = "tuneship"
    deployment = var.default_resource_name
    managed-by = "terraform"
  })
}
