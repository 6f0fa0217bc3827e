"""Golden lists: what infra/terraform says, written down a second time. A change there is a decision here."""

from __future__ import annotations

from terraform_files import Expression

# Every right that is given, in full. A line here is a decision.
RIGHTS = {
    "google_project_iam_member.nodes": ("roles/container.defaultNodeServiceAccount", "nodes"),
    "google_project_iam_member.build_logs": ("roles/logging.logWriter", "build"),
    "google_project_iam_member.metadata_database": ("roles/cloudsql.client", "metadata"),
    "google_storage_bucket_iam_member.training": ("roles/storage.objectUser", "training"),
    "google_storage_bucket_iam_member.metadata": ("roles/storage.objectViewer", "metadata"),
    "google_storage_bucket_iam_member.serving": ("roles/storage.objectViewer", "serving"),
    "google_storage_bucket_iam_member.build": ("roles/storage.objectViewer", "build"),
    "google_artifact_registry_repository_iam_member.nodes_reader": ("roles/artifactregistry.reader", "nodes"),
    "google_artifact_registry_repository_iam_member.build_writer": ("roles/artifactregistry.writer", "build"),
    "google_secret_manager_secret_iam_member.training_hub_token": ("roles/secretmanager.secretAccessor", "training"),
    "google_secret_manager_secret_iam_member.metadata_database_password": (
        "roles/secretmanager.secretAccessor",
        "metadata",
    ),
}

# The service that has to be on for a resource, by the beginning of its type; the longest that fits.
SERVICES = {
    "google_artifact_registry_": "artifactregistry",
    "google_compute_": "compute",
    "google_container_": "container",
    "google_project_iam_": "cloudresourcemanager",
    "google_project_service": "serviceusage",
    "google_secret_manager_": "secretmanager",
    "google_service_account": "iam",
    "google_service_networking_": "servicenetworking",
    "google_sql_": "sqladmin",
    "google_storage_": "storage",
}

# As in Google's own test of its safer-cluster module: what every cluster here must say.
CLUSTER = {
    "deletion_protection": Expression("var.deletion_protection"),
    "resource_labels": Expression("local.labels"),
    "release_channel.channel": "REGULAR",
    "private_cluster_config.enable_private_nodes": True,
    "private_cluster_config.enable_private_endpoint": Expression("var.private_cluster"),
    "master_authorized_networks_config.gcp_public_cidrs_access_enabled": False,
    "master_auth.client_certificate_config.issue_client_certificate": False,
    "anonymous_authentication_config.mode": "LIMITED",
    "rbac_binding_config.enable_insecure_binding_system_unauthenticated": False,
    "rbac_binding_config.enable_insecure_binding_system_authenticated": False,
    "control_plane_endpoints_config.dns_endpoint_config.allow_external_traffic": True,
    "secret_manager_config.enabled": True,
    "security_posture_config.mode": "BASIC",
    "cost_management_config.enabled": True,
    "ip_allocation_policy.cluster_secondary_range_name": "pods",
    "ip_allocation_policy.services_secondary_range_name": "services",
}
AUTOPILOT = {
    "enable_autopilot": True,
    "cluster_autoscaling.auto_provisioning_defaults.service_account": Expression("google_service_account.nodes.email"),
    "node_pool_auto_config.node_kubelet_config.insecure_kubelet_readonly_port_enabled": "FALSE",
}
STANDARD = {
    "datapath_provider": "ADVANCED_DATAPATH",
    "enable_intranode_visibility": True,
    "enable_legacy_abac": False,
    "enable_shielded_nodes": True,
    "networking_mode": "VPC_NATIVE",
    "remove_default_node_pool": True,
    "workload_identity_config.workload_pool": Expression("local.workload_pool"),
    "node_pool_defaults.node_config_defaults.insecure_kubelet_readonly_port_enabled": "FALSE",
    "node_config.service_account": Expression("google_service_account.nodes.email"),
    "node_config.shielded_instance_config.enable_secure_boot": True,
}
POOL = {
    "management.auto_repair": True,
    "management.auto_upgrade": True,
    "node_config.image_type": "COS_CONTAINERD",
    "node_config.service_account": Expression("google_service_account.nodes.email"),
    "node_config.metadata": {"disable-legacy-endpoints": "true"},
    "node_config.resource_labels": Expression("local.labels"),
    "node_config.kubelet_config.insecure_kubelet_readonly_port_enabled": "FALSE",
    "node_config.shielded_instance_config.enable_integrity_monitoring": True,
    "node_config.workload_metadata_config.mode": "GKE_METADATA",
}
DATABASE = {
    "database_version": "POSTGRES_15",
    "deletion_protection": Expression("var.deletion_protection"),
    "settings.deletion_protection_enabled": Expression("var.deletion_protection"),
    "settings.edition": "ENTERPRISE",
    "settings.connector_enforcement": "REQUIRED",
    "settings.user_labels": Expression("local.labels"),
    "settings.ip_configuration.ipv4_enabled": False,
    "settings.ip_configuration.ssl_mode": "ENCRYPTED_ONLY",
    "settings.ip_configuration.private_network": Expression("google_compute_network.main.id"),
    "settings.backup_configuration.enabled": True,
    "settings.backup_configuration.point_in_time_recovery_enabled": True,
    "settings.backup_configuration.transaction_log_retention_days": 7,
    "settings.password_validation_policy.enable_password_policy": True,
}
BUCKET = {
    "uniform_bucket_level_access": True,
    "public_access_prevention": "enforced",
    "versioning.enabled": True,
    "soft_delete_policy.retention_duration_seconds": 604800,
    "force_destroy": Expression("!var.deletion_protection"),
    "labels": Expression("local.labels"),
}
REGISTRY = {
    "docker_config.immutable_tags": True,
    "vulnerability_scanning_config.enablement_config": "INHERITED",
    "labels": Expression("local.labels"),
}

# How many GPUs a machine comes with; Google refuses a pool that says otherwise.
ACCELERATORS = {"g2-standard-16": 1, "g2-standard-24": 2, "a2-highgpu-1g": 1}

TUTORIAL_VARIABLES = {
    "project_id", "default_resource_name", "cluster_name", "cluster_location", "private_cluster", "autopilot_cluster",
    "network_name", "subnetwork_name", "subnetwork_region", "subnetwork_cidr", "subnetwork_description",
    "service_account_name", "bucket_name", "metaflow_cloudsql_instance", "metaflow_cloudsql_instance_region",
    "metaflow_kubernetes_namespace", "metaflow_kubernetes_service_account_name", "metaflow_argo_workflows_sa_name",
}  # fmt: skip
TUTORIAL_OUTPUTS = {
    "argo_workflows_k8s_sa_name", "cloudsql_instance_name", "finetune_image_registry_name", "gke_cluster_location",
    "gke_cluster_name", "metaflow_datastore_bucket_name", "metaflow_k8s_namespace", "metaflow_k8s_sa_name",
    "project_id",
}  # fmt: skip
