locals {
  network_name    = var.network_name != "" ? var.network_name : var.default_resource_name
  subnetwork_name = var.subnetwork_name != "" ? var.subnetwork_name : var.default_resource_name

  private_services_range = format(
    "%s/%d",
    google_compute_global_address.private_services.address,
    google_compute_global_address.private_services.prefix_length,
  )
}

resource "google_compute_network" "main" {
  project                 = var.project_id
  name                    = local.network_name
  description             = "Tuneship: cluster, database and nothing else"
  auto_create_subnetworks = false
  routing_mode            = "REGIONAL"

  depends_on = [google_project_service.enabled]
}

resource "google_compute_subnetwork" "main" {
  project       = var.project_id
  name          = local.subnetwork_name
  description   = var.subnetwork_description
  network       = google_compute_network.main.id
  region        = var.subnetwork_region
  ip_cidr_range = var.subnetwork_cidr

  # Nodes have no public address; storage, registry and secrets are reached without leaving Google's network.
  private_ip_google_access = true

  # Named ranges, so that network policies can name them as well.
  secondary_ip_range {
    range_name    = "pods"
    ip_cidr_range = var.pods_cidr
  }

  secondary_ip_range {
    range_name    = "services"
    ip_cidr_range = var.services_cidr
  }

  # A tenth of the flows, in ten-minute steps: enough to see who spoke to whom, at little cost.
  log_config {
    aggregation_interval = "INTERVAL_10_MIN"
    flow_sampling        = 0.1
    metadata             = "INCLUDE_ALL_METADATA"
  }
}

# The network refuses what no rule allows, silently. This rule says the same and logs it. GKE's own rules
# come first (their priority is 1000).
resource "google_compute_firewall" "deny_ingress" {
  project     = var.project_id
  name        = "${local.network_name}-deny-ingress"
  description = "Refuses and logs what nothing else allows"
  network     = google_compute_network.main.id
  direction   = "INGRESS"
  priority    = 65534

  source_ranges = ["0.0.0.0/0"]

  deny {
    protocol = "all"
  }

  log_config {
    metadata = "EXCLUDE_ALL_METADATA"
  }
}

# The way out for nodes without a public address: model hub, image registries. Nothing comes in by it.
resource "google_compute_router" "main" {
  project = var.project_id
  name    = "${local.network_name}-router"
  network = google_compute_network.main.id
  region  = var.subnetwork_region
}

resource "google_compute_router_nat" "main" {
  project = var.project_id
  name    = "${local.network_name}-nat"
  router  = google_compute_router.main.name
  region  = var.subnetwork_region

  nat_ip_allocate_option             = "AUTO_ONLY"
  source_subnetwork_ip_ranges_to_nat = "LIST_OF_SUBNETWORKS"

  subnetwork {
    name                    = google_compute_subnetwork.main.id
    source_ip_ranges_to_nat = ["ALL_IP_RANGES"]
  }

  log_config {
    enable = true
    filter = "ERRORS_ONLY"
  }
}

# Private service access: the range from which Cloud SQL takes its address.
resource "google_compute_global_address" "private_services" {
  project       = var.project_id
  name          = "${local.network_name}-private-services"
  purpose       = "VPC_PEERING"
  address_type  = "INTERNAL"
  prefix_length = var.private_services_prefix_length
  network       = google_compute_network.main.id
  labels        = local.labels
}

resource "google_service_networking_connection" "private_services" {
  network                 = google_compute_network.main.id
  service                 = "servicenetworking.googleapis.com"
  reserved_peering_ranges = [google_compute_global_address.private_services.name]

  # Google holds on to the connection for days after the last instance is gone, and deleting it fails until
  # then: the known end of many a `terraform destroy`. Abandoned, it goes with the network.
  deletion_policy = "ABANDON"

  depends_on = [google_project_service.enabled]
}
