# Metaflow's metadata: Postgres on a private address.
#
# The service logs in with a password of its own. It is made during an apply, written to Cloud SQL and to
# Secret Manager by write-only arguments, and stands in no plan and no state. It is of no use alone: the
# instance accepts only Google's connectors, which IAM lets through, on this instance, for this one account.
# Logging in by IAM instead would need a grant inside the database first, which nothing here can make.

locals {
  database_name = "metaflow"
  database_instance_name = format(
    "%s-%s",
    var.metaflow_cloudsql_instance != "" ? var.metaflow_cloudsql_instance : var.default_resource_name,
    random_id.database.hex,
  )
}

# An instance's name stays taken for a week after it is deleted.
resource "random_id" "database" {
  byte_length = 3
}

resource "google_sql_database_instance" "metadata" {
  # checkov:skip=CKV_GCP_6: connector_enforcement admits only Google's connectors, and those bring a client certificate
  # checkov:skip=CKV2_GCP_13: a line in the log for every heartbeat; what is slow shows in the metrics
  # checkov:skip=CKV_GCP_79: 15 is what the metadata service has been seen to work with
  project             = var.project_id
  name                = local.database_instance_name
  region              = var.metaflow_cloudsql_instance_region
  database_version    = "POSTGRES_15"
  deletion_protection = var.deletion_protection

  settings {
    edition                     = "ENTERPRISE"
    tier                        = var.metaflow_cloudsql_tier
    availability_type           = "ZONAL"
    disk_type                   = "PD_SSD"
    disk_autoresize             = true
    disk_autoresize_limit       = 50
    deletion_protection_enabled = var.deletion_protection
    connector_enforcement       = "REQUIRED"
    user_labels                 = local.labels

    ip_configuration {
      ipv4_enabled    = false
      private_network = google_compute_network.main.id
      ssl_mode        = "ENCRYPTED_ONLY"
    }

    backup_configuration {
      enabled                        = true
      start_time                     = "03:00"
      point_in_time_recovery_enabled = true
      transaction_log_retention_days = 7

      backup_retention_settings {
        retained_backups = 14
        retention_unit   = "COUNT"
      }
    }

    maintenance_window {
      day          = 7
      hour         = 4
      update_track = "stable"
    }

    password_validation_policy {
      enable_password_policy      = true
      complexity                  = "COMPLEXITY_DEFAULT"
      disallow_username_substring = true
      min_length                  = 24
    }

    # Who connected, what failed or waited, and every change of the schema. Written out: scanners read no loops.
    database_flags {
      name  = "cloudsql.enable_pgaudit"
      value = "on"
    }

    database_flags {
      name  = "log_checkpoints"
      value = "on"
    }

    database_flags {
      name  = "log_connections"
      value = "on"
    }

    database_flags {
      name  = "log_disconnections"
      value = "on"
    }

    database_flags {
      name  = "log_hostname"
      value = "on"
    }

    database_flags {
      name  = "log_lock_waits"
      value = "on"
    }

    database_flags {
      name  = "log_min_duration_statement"
      value = "-1"
    }

    database_flags {
      name  = "log_min_error_statement"
      value = "error"
    }

    database_flags {
      name  = "log_min_messages"
      value = "error"
    }

    database_flags {
      name  = "log_statement"
      value = "ddl"
    }

    database_flags {
      name  = "log_temp_files"
      value = "0"
    }
  }

  timeouts {
    create = "45m"
    update = "45m"
    delete = "45m"
  }

  # The address comes out of the peered range; nothing in the arguments says so.
  depends_on = [google_service_networking_connection.private_services]
}

# Both go with the instance. Dropped one by one, Postgres refuses: the user owns tables, and the database has
# sessions open.
resource "google_sql_database" "metadata" {
  project         = var.project_id
  name            = local.database_name
  instance        = google_sql_database_instance.metadata.name
  charset         = "UTF8"
  collation       = "en_US.UTF8"
  deletion_policy = "ABANDON"
}

ephemeral "random_password" "database" {
  length      = 40
  special     = true
  min_lower   = 1
  min_upper   = 1
  min_numeric = 1
  min_special = 1
  # Characters that no shell, URL or connection string reads as its own.
  override_special = "-_"
}

resource "google_sql_user" "metadata" {
  project             = var.project_id
  name                = var.metaflow_db_user
  instance            = google_sql_database_instance.metadata.name
  type                = "BUILT_IN"
  password_wo         = ephemeral.random_password.database.result
  password_wo_version = var.metaflow_db_password_version
  deletion_policy     = "ABANDON"
}

# Cloud SQL has no policy an instance, so the right is given on the project and narrowed to this instance.
resource "google_project_iam_member" "metadata_database" {
  project = var.project_id
  role    = "roles/cloudsql.client"
  member  = google_service_account.metadata.member

  condition {
    title       = "only-${google_sql_database_instance.metadata.name}"
    description = "Connects to this instance only"
    expression  = <<-EOT
      resource.type == "sqladmin.googleapis.com/Instance" &&
      resource.name == "projects/${var.project_id}/instances/${google_sql_database_instance.metadata.name}"
    EOT
  }
}
