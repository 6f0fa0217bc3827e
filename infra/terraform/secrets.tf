# The hub token is never Terraform's: this makes the empty box, and the value is added by hand, see README.md.
resource "google_secret_manager_secret" "hub_token" {
  project             = var.project_id
  secret_id           = "${var.default_resource_name}-hub-token"
  labels              = local.labels
  deletion_protection = var.deletion_protection

  replication {
    auto {}
  }

  depends_on = [google_project_service.enabled]
}

resource "google_secret_manager_secret_iam_member" "training_hub_token" {
  project   = var.project_id
  secret_id = google_secret_manager_secret.hub_token.secret_id
  role      = "roles/secretmanager.secretAccessor"
  member    = google_service_account.training.member
}

resource "google_secret_manager_secret" "database_password" {
  project             = var.project_id
  secret_id           = "${var.default_resource_name}-metadata-db-password"
  labels              = local.labels
  deletion_protection = var.deletion_protection

  replication {
    auto {}
  }

  depends_on = [google_project_service.enabled]
}

# The same value that database.tf gives the user, within the same apply. One version for both: raised, the two
# change together.
resource "google_secret_manager_secret_version" "database_password" {
  secret                 = google_secret_manager_secret.database_password.id
  secret_data_wo         = ephemeral.random_password.database.result
  secret_data_wo_version = var.metaflow_db_password_version
}

resource "google_secret_manager_secret_iam_member" "metadata_database_password" {
  project   = var.project_id
  secret_id = google_secret_manager_secret.database_password.secret_id
  role      = "roles/secretmanager.secretAccessor"
  member    = google_service_account.metadata.member
}
