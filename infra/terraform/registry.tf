locals {
  image_registry_url = format(
    "%s-docker.pkg.dev/%s/%s",
    google_artifact_registry_repository.images.location,
    var.project_id,
    google_artifact_registry_repository.images.repository_id,
  )
}

resource "google_artifact_registry_repository" "images" {
  # checkov:skip=CKV_GCP_84: Google encrypts at rest; a key of our own would have to outlive every image
  project       = var.project_id
  location      = var.subnetwork_region
  repository_id = var.default_resource_name
  description   = "Tuneship: training and serving images"
  format        = "DOCKER"
  labels        = local.labels

  # A tag that has been run means the same image for ever.
  docker_config {
    immutable_tags = true
  }

  vulnerability_scanning_config {
    enablement_config = "INHERITED"
  }

  cleanup_policies {
    id     = "untagged"
    action = "DELETE"

    condition {
      tag_state  = "UNTAGGED"
      older_than = "2592000s"
    }
  }

  depends_on = [google_project_service.enabled]
}

resource "google_artifact_registry_repository_iam_member" "nodes_reader" {
  project    = var.project_id
  location   = google_artifact_registry_repository.images.location
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.reader"
  member     = google_service_account.nodes.member
}

resource "google_artifact_registry_repository_iam_member" "build_writer" {
  project    = var.project_id
  location   = google_artifact_registry_repository.images.location
  repository = google_artifact_registry_repository.images.name
  role       = "roles/artifactregistry.writer"
  member     = google_service_account.build.member
}
