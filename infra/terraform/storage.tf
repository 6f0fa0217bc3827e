# One bucket: Metaflow's artifacts, checkpoints, adapters, the base model, the sources of image builds.
locals {
  bucket_name = format(
    "%s-%s",
    var.bucket_name != "" ? var.bucket_name : var.default_resource_name,
    random_id.bucket.hex,
  )

  # The two prefixes that mean something here; what else lies in the bucket stays until it is deleted.
  checkpoint_prefix   = "checkpoints/"
  build_source_prefix = "cloudbuild/"
}

# Names of buckets are shared with the whole world.
resource "random_id" "bucket" {
  byte_length = 4
}

resource "google_storage_bucket" "datastore" {
  # checkov:skip=CKV_GCP_62: usage logs need a second bucket to guard; data access audit logs are the project's to switch on
  project       = var.project_id
  name          = local.bucket_name
  location      = upper(var.subnetwork_region)
  storage_class = "STANDARD"
  labels        = local.labels

  # Only the switch that tears everything down may empty it.
  force_destroy = !var.deletion_protection

  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  # Overwritten: the old version stays for two weeks. Deleted: it can be had back for a week.
  versioning {
    enabled = true
  }

  soft_delete_policy {
    retention_duration_seconds = 604800
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }

    condition {
      with_state                 = "ARCHIVED"
      days_since_noncurrent_time = 14
    }
  }

  # A checkpoint is there to go on from, not to keep.
  lifecycle_rule {
    action {
      type = "Delete"
    }

    condition {
      age            = var.checkpoint_retention_days
      matches_prefix = [local.checkpoint_prefix]
    }
  }

  lifecycle_rule {
    action {
      type = "Delete"
    }

    condition {
      age            = 7
      matches_prefix = [local.build_source_prefix]
    }
  }

  # What a killed upload left behind is invisible and paid for.
  lifecycle_rule {
    action {
      type = "AbortIncompleteMultipartUpload"
    }

    condition {
      age = 2
    }
  }

  depends_on = [google_project_service.enabled]
}

resource "google_storage_bucket_iam_member" "training" {
  bucket = google_storage_bucket.datastore.name
  role   = "roles/storage.objectUser"
  member = google_service_account.training.member
}

# The UI draws graphs and logs from what the runs have stored.
resource "google_storage_bucket_iam_member" "metadata" {
  bucket = google_storage_bucket.datastore.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.metadata.member
}

resource "google_storage_bucket_iam_member" "serving" {
  bucket = google_storage_bucket.datastore.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.serving.member
}

resource "google_storage_bucket_iam_member" "build" {
  bucket = google_storage_bucket.datastore.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.build.member

  condition {
    title       = "only-build-sources"
    description = "Reads what was uploaded for a build, nothing that a run has stored"
    expression = format(
      "resource.name.startsWith(\"projects/_/buckets/%s/objects/%s\")",
      google_storage_bucket.datastore.name,
      local.build_source_prefix,
    )
  }
}
