# One Google account a workload. What a workload may do stands beside the thing it may do it to: database.tf,
# storage.tf, registry.tf and secrets.tf; only what has no smaller home is given on the project, here.
# Every binding adds one member (`_member`): the authoritative kinds would throw out whoever else is there.

locals {
  nodes_account_id = var.service_account_name != "" ? var.service_account_name : "${var.default_resource_name}-nodes"

  # Who may act as which account: exactly one Kubernetes account each.
  workload_identities = {
    metadata = {
      account   = google_service_account.metadata.name
      namespace = var.metaflow_kubernetes_namespace
      name      = var.metaflow_kubernetes_service_account_name
    }
    training = {
      account   = google_service_account.training.name
      namespace = local.argo_namespace
      name      = var.metaflow_argo_workflows_sa_name
    }
    serving = {
      account   = google_service_account.serving.name
      namespace = var.serving_kubernetes_namespace
      name      = var.serving_kubernetes_service_account_name
    }
  }
}

resource "google_service_account" "nodes" {
  project      = var.project_id
  account_id   = local.nodes_account_id
  display_name = "Tuneship: nodes"
  description  = "The cluster's machines: logs, metrics, image pulls"

  depends_on = [google_project_service.enabled]
}

resource "google_service_account" "metadata" {
  project      = var.project_id
  account_id   = "${var.default_resource_name}-metadata"
  display_name = "Tuneship: Metaflow's metadata service and UI"
  description  = "Connects to the database, reads what runs have stored"

  depends_on = [google_project_service.enabled]
}

resource "google_service_account" "training" {
  project      = var.project_id
  account_id   = "${var.default_resource_name}-train"
  display_name = "Tuneship: steps that Argo Workflows runs"
  description  = "Reads and writes the bucket, reads the hub token"

  depends_on = [google_project_service.enabled]
}

resource "google_service_account" "serving" {
  project      = var.project_id
  account_id   = "${var.default_resource_name}-serve"
  display_name = "Tuneship: the model server and its gateway"
  description  = "Reads the bucket"

  depends_on = [google_project_service.enabled]
}

resource "google_service_account" "build" {
  project      = var.project_id
  account_id   = "${var.default_resource_name}-build"
  display_name = "Tuneship: image builds"
  description  = "Cloud Build: reads its source, pushes to the one repository"

  depends_on = [google_project_service.enabled]
}

# The least that GKE asks of a node's account: it writes logs, metrics and autoscaling metrics, no more.
resource "google_project_iam_member" "nodes" {
  project = var.project_id
  role    = "roles/container.defaultNodeServiceAccount"
  member  = google_service_account.nodes.member
}

resource "google_project_iam_member" "build_logs" {
  project = var.project_id
  role    = "roles/logging.logWriter"
  member  = google_service_account.build.member
}

resource "google_service_account_iam_member" "workload_identity" {
  for_each = local.workload_identities

  service_account_id = each.value.account
  role               = "roles/iam.workloadIdentityUser"
  member             = "serviceAccount:${local.workload_pool}[${each.value.namespace}/${each.value.name}]"

  # The pool of identities exists only once a cluster has been made.
  depends_on = [
    google_container_cluster.autopilot,
    google_container_cluster.standard,
  ]
}
