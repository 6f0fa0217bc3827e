# What the rest reads, by `terraform output -json`. None of it is secret.

# ── The tutorial's outputs, under their names ────────────────────────────────────────────────────────────────

output "argo_workflows_k8s_sa_name" {
  description = "Kubernetes service account, in argo_namespace, under which the steps of a flow run"
  value       = var.metaflow_argo_workflows_sa_name
}

output "cloudsql_instance_name" {
  description = "Name of the database instance"
  value       = google_sql_database_instance.metadata.name
}

output "finetune_image_registry_name" {
  description = "Name of the image repository"
  value       = google_artifact_registry_repository.images.repository_id
}

output "gke_cluster_location" {
  description = "Region or zone of the cluster"
  value       = local.cluster.location
}

output "gke_cluster_name" {
  description = "Name of the cluster"
  value       = local.cluster.name
}

output "metaflow_datastore_bucket_name" {
  description = "Name of the bucket"
  value       = google_storage_bucket.datastore.name
}

output "metaflow_k8s_namespace" {
  description = "Namespace of the metadata service and the UI"
  value       = var.metaflow_kubernetes_namespace
}

output "metaflow_k8s_sa_name" {
  description = "Kubernetes service account of the metadata service and the UI, in metaflow_k8s_namespace"
  value       = var.metaflow_kubernetes_service_account_name
}

output "project_id" {
  description = "Project in which everything is"
  value       = var.project_id
}

# ── Project and cluster ──────────────────────────────────────────────────────────────────────────────────────

output "project_number" {
  description = "The project's number"
  value       = data.google_project.this.number
}

output "region" {
  description = "Region of the subnetwork, the bucket and the image repository"
  value       = var.subnetwork_region
}

output "autopilot_cluster" {
  description = "Whether the cluster is an Autopilot one"
  value       = var.autopilot_cluster
}

output "gke_dns_endpoint" {
  description = "Host name of the control plane, guarded by IAM, with a public certificate"
  value       = local.cluster_dns_endpoint
}

output "gke_get_credentials_command" {
  description = "The command that points kubectl at the cluster"
  value = join(" ", [
    "gcloud container clusters get-credentials", local.cluster.name,
    "--location", local.cluster.location,
    "--project", var.project_id,
    "--dns-endpoint",
  ])
}

output "gke_control_plane_cidr" {
  description = "Private address of the control plane, as a range, for network policies"
  value       = "${local.cluster.private_cluster_config[0].private_endpoint}/32"
}

output "nodes_cidr" {
  description = "Range of the nodes, for network policies"
  value       = google_compute_subnetwork.main.ip_cidr_range
}

output "pods_cidr" {
  description = "Range of the pods, for network policies"
  value       = var.pods_cidr
}

output "services_cidr" {
  description = "Range of Kubernetes services, for network policies"
  value       = var.services_cidr
}

# ── Database ─────────────────────────────────────────────────────────────────────────────────────────────────

output "cloudsql_connection_name" {
  description = "PROJECT:REGION:INSTANCE, what the Cloud SQL proxy is started with"
  value       = google_sql_database_instance.metadata.connection_name
}

output "cloudsql_private_ip" {
  description = "Private address of the database instance; the proxy speaks to its port 3307"
  value       = google_sql_database_instance.metadata.private_ip_address
}

output "cloudsql_private_services_cidr" {
  description = "Range out of which that address comes, for network policies"
  value       = local.private_services_range
}

output "cloudsql_database_name" {
  description = "Name of the metadata service's database"
  value       = google_sql_database.metadata.name
}

output "cloudsql_database_user" {
  description = "The metadata service's user"
  value       = google_sql_user.metadata.name
}

output "cloudsql_password_secret_id" {
  description = "Secret Manager secret with that user's password; only the metadata service's account reads it"
  value       = google_secret_manager_secret.database_password.secret_id
}

# ── Storage, images, secrets ─────────────────────────────────────────────────────────────────────────────────

output "metaflow_datastore_sysroot_gs" {
  description = "Root of Metaflow's datastore"
  value       = "gs://${google_storage_bucket.datastore.name}/metaflow"
}

output "checkpoint_root_uri" {
  description = "Where checkpoints are mirrored; what lies below is deleted after checkpoint_retention_days"
  value       = "gs://${google_storage_bucket.datastore.name}/${trimsuffix(local.checkpoint_prefix, "/")}"
}

output "build_source_uri" {
  description = "Where gcloud puts the source of an image build: the only part of the bucket that the build account reads"
  value       = "gs://${google_storage_bucket.datastore.name}/${trimsuffix(local.build_source_prefix, "/")}"
}

output "image_registry_url" {
  description = "What an image's name begins with: REGION-docker.pkg.dev/PROJECT/REPOSITORY"
  value       = local.image_registry_url
}

output "hub_token_secret_id" {
  description = "Secret Manager secret for the hub token, empty until a version is added; only the training account reads it"
  value       = google_secret_manager_secret.hub_token.secret_id
}

# ── Identities and namespaces ────────────────────────────────────────────────────────────────────────────────

output "argo_namespace" {
  description = "Namespace of Argo's controller, its server and the workflows"
  value       = helm_release.argo_workflows.namespace
}

output "argo_chart_version" {
  description = "Version of the Argo Workflows chart"
  value       = helm_release.argo_workflows.version
}

output "argo_version" {
  description = "Version of Argo Workflows"
  value       = local.argo_version
}

output "serving_k8s_namespace" {
  description = "Namespace of the model server and its gateway"
  value       = var.serving_kubernetes_namespace
}

output "serving_k8s_sa_name" {
  description = "Kubernetes service account of the model server, in serving_k8s_namespace"
  value       = var.serving_kubernetes_service_account_name
}

output "nodes_service_account_email" {
  description = "Google service account of the nodes"
  value       = google_service_account.nodes.email
}

output "metadata_service_account_email" {
  description = "Google service account of metaflow_k8s_sa_name: annotate that with it"
  value       = google_service_account.metadata.email
}

output "training_service_account_email" {
  description = "Google service account of argo_workflows_k8s_sa_name: annotate that with it"
  value       = google_service_account.training.email
}

output "serving_service_account_email" {
  description = "Google service account of serving_k8s_sa_name: annotate that with it"
  value       = google_service_account.serving.email
}

output "build_service_account_email" {
  description = "Google service account under which Cloud Build builds and pushes images"
  value       = google_service_account.build.email
}

output "labels" {
  description = "The labels on everything that can carry them"
  value       = local.labels
}
