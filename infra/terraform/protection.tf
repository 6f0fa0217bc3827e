# The cluster, the database, the secrets and the bucket refuse to go while var.deletion_protection is on. But
# what hangs on them goes first: without this, a destroy by mistake would take Argo, the node pools and every
# right away before it is refused. This one hangs on all of it, so it is asked first, and nothing goes at all.
resource "terraform_data" "protection" {
  input = var.deletion_protection

  provisioner "local-exec" {
    when    = destroy
    command = self.input ? "echo deletion_protection is on: apply with false first && exit 1" : "echo deletion_protection is off"
  }

  depends_on = [
    google_artifact_registry_repository_iam_member.build_writer,
    google_compute_firewall.deny_ingress,
    google_container_node_pool.gpu,
    google_project_iam_member.build_logs,
    google_project_iam_member.metadata_database,
    google_secret_manager_secret_iam_member.metadata_database_password,
    google_secret_manager_secret_iam_member.training_hub_token,
    google_secret_manager_secret_version.database_password,
    google_service_account_iam_member.workload_identity,
    google_sql_database.metadata,
    google_sql_user.metadata,
    google_storage_bucket_iam_member.build,
    google_storage_bucket_iam_member.metadata,
    google_storage_bucket_iam_member.serving,
    google_storage_bucket_iam_member.training,
    helm_release.argo_workflows,
  ]
}
