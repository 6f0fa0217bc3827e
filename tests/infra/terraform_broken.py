"""The rules of terraform_rules.py, each broken: what stands in infra/terraform, and what is put there instead."""

import terraform_rules as rules

BROKEN: dict[rules.Rule, list[tuple[str, str]]] = {
    rules.arguments_are_the_providers: [
        ("auto_create_subnetworks = false", "auto_create_subnets = false"),
        ("  location      = upper(var.subnetwork_region)\n", ""),
        ("enable_private_nodes    = true", 'enable_private_nodes    = "yes, please"'),
        ("release_channel {", "release_train {"),
        ("google_compute_subnetwork.main.ip_cidr_range", "google_compute_subnetwork.main.cidr"),
        ("google_service_account.build.email", "google_service_account.builder.email"),
        ('command     = "gke-gcloud-auth-plugin"', 'cmd = "gke-gcloud-auth-plugin"'),
    ],
    rules.everything_is_pinned: [
        ('  version          = "1.0.18"\n', ""),
    ],
    rules.services_are_enabled_first: [
        (
            '  routing_mode            = "REGIONAL"\n\n  depends_on = [google_project_service.enabled]',
            "",
        ),
        ("disable_on_destroy = false", "disable_on_destroy = true"),
    ],
    rules.rights_are_the_listed_ones: [
        ('"roles/storage.objectUser"', '"roles/storage.admin"'),
        ('"roles/logging.logWriter"', '"roles/editor"'),
        (
            'resource "google_artifact_registry_repository_iam_member" "nodes_reader"',
            'resource "google_artifact_registry_repository_iam_binding" "nodes_reader"',
        ),
        ("member = google_service_account.serving.member", 'member = "allUsers"'),
        (
            "member    = google_service_account.training.member",
            "member    = google_service_account.serving.member",
        ),
    ],
    rules.rights_lie_on_one_resource: [
        (
            "google_storage_bucket.datastore.name\n  role",
            "each.value\n  role",
        ),
        (
            "&&\n      resource.name ==",
            "||\n      resource.name !=",
        ),
        (
            "google_secret_manager_secret.hub_token.secret_id\n  role",
            '"hub-token"\n  role',
        ),
    ],
    rules.one_account_a_workload: [
        ("google_service_account.serving.name", "google_service_account.training.name"),
        ("[${each.value.namespace}/${each.value.name}]", "[${each.value.namespace}/default]"),
        (
            "    google_container_cluster.autopilot,\n    google_container_cluster.standard,\n  ]\n}\n",
            "]}\n",
        ),
    ],
    rules.no_secret_in_the_state: [
        ("password_wo         = ephemeral", "password            = ephemeral"),
        ("secret_data_wo         = ephemeral", "secret_data = ephemeral"),
        ('data "google_project" "this"', 'data "google_client_config" "this"'),
    ],
    rules.clusters_are_hardened: [
        ("enable_private_nodes    = true", "enable_private_nodes    = false"),
        ("enable_private_endpoint = var.private_cluster", "enable_private_endpoint = false"),
        ("issue_client_certificate = false", "issue_client_certificate = true"),
        ('channel = "REGULAR"', 'channel = "RAPID"'),
        ('datapath_provider           = "ADVANCED_DATAPATH"', ""),
        ("enable_legacy_abac          = false", "enable_legacy_abac = true"),
        ('insecure_kubelet_readonly_port_enabled = "FALSE"', 'insecure_kubelet_readonly_port_enabled = "TRUE"'),
        ("for_each = var.authorized_networks", 'for_each = { all = "0.0.0.0/0" }'),
        ("    google_compute_router_nat.main,\n", ""),
        ('mode = "LIMITED"', 'mode = "ENABLED"'),
    ],
    rules.node_pools_are_hardened: [
        ('image_type      = "COS_CONTAINERD"', 'image_type = "UBUNTU_CONTAINERD"'),
        ("total_min_node_count = 0", "total_min_node_count = 1"),
        (
            "disk_size_gb    = 50\n    service_account = google_service_account.nodes.email",
            "disk_size_gb = 50",
        ),
    ],
    rules.database_is_private: [
        ("ipv4_enabled    = false", "ipv4_enabled    = true"),
        ('"ENCRYPTED_ONLY"', '"ALLOW_UNENCRYPTED_AND_ENCRYPTED"'),
        ("point_in_time_recovery_enabled = true", "point_in_time_recovery_enabled = false"),
        ("deletion_protection_enabled = var.deletion_protection", "deletion_protection_enabled = false"),
        ('connector_enforcement       = "REQUIRED"', 'connector_enforcement = "NOT_REQUIRED"'),
        ("depends_on = [google_service_networking_connection.private_services]", ""),
    ],
    rules.bucket_is_guarded: [
        ('public_access_prevention    = "enforced"', 'public_access_prevention = "inherited"'),
        ("uniform_bucket_level_access = true", "uniform_bucket_level_access = false"),
        ("matches_prefix = [local.checkpoint_prefix]", "matches_prefix = []"),
        ('checkpoint_prefix   = "checkpoints/"', 'checkpoint_prefix   = ""'),
        ("retention_duration_seconds = 604800", "retention_duration_seconds = 0"),
    ],
    rules.registry_keeps_tags: [
        ("immutable_tags = true", "immutable_tags = false"),
        ('tag_state  = "UNTAGGED"', 'tag_state  = "ANY"'),
    ],
    rules.network_is_closed: [
        (
            'deletion_policy = "ABANDON"\n\n  depends_on',
            "depends_on",
        ),
        ("private_ip_google_access = true", "private_ip_google_access = false"),
        ("  deny {", "  allow {"),
    ],
    rules.argo_is_narrow: [
        ("singleNamespace      = true", "singleNamespace      = false"),
        ('verbs     = ["get", "list", "watch"]', 'verbs     = ["*"]'),
        ('resources = ["configmaps"]', 'resources = ["configmaps", "secrets"]'),
        ("accessAllSecrets = false", "accessAllSecrets = true"),
        ("rbac = { create = false }", "rbac = { create = true }"),
        ("readOnlyRootFilesystem   = true", "readOnlyRootFilesystem   = false"),
        ('serviceType        = "ClusterIP"', 'serviceType        = "LoadBalancer"'),
    ],
    rules.argo_values_are_the_charts: [
        ("authModes          = ", "authMods           = "),
        ("singleNamespace      = true", "namespaced           = true"),
        ('version          = "1.0.18"', 'version          = "1.0.17"'),
        ('"v4.0.6"', '"v4.0.7"'),
    ],
    rules.names_do_not_collide: [
        ("    random_id.database.hex,\n", '    "database",\n'),
    ],
    rules.everything_is_labelled: [
        ("  resource_labels     = local.labels\n", ""),
        (
            'secret_id           = "${var.default_resource_name}-hub-token"\n  labels              = local.labels',
            'secret_id = "hub"',
        ),
        ('app        = "tuneship"', ""),
    ],
    rules.tearing_down_takes_one_switch: [
        (
            "deletion_protection = var.deletion_protection\n  resource_labels",
            "deletion_protection = false\n  resource_labels",
        ),
        ("    google_container_node_pool.gpu,\n", ""),
        ("    helm_release.argo_workflows,\n", ""),
        (
            "    google_container_cluster.standard,\n    google_container_node_pool.system,\n",
            "",
        ),
        (
            '  password_wo_version = var.metaflow_db_password_version\n  deletion_policy     = "ABANDON"',
            "",
        ),
    ],
    rules.variables_explain_and_check_themselves: [
        ('  description = "The Google Cloud project in which everything is made"\n', ""),
        ("condition     = length(var.subnetwork_description) <= 2048", "condition     = true"),
        ('variable "subnetwork_cidr"', 'variable "subnet_cidr"'),
        ("  type        = number\n", ""),
    ],
    rules.outputs_explain_themselves: [
        ('output "metaflow_k8s_sa_name"', 'output "metadata_sa_name"'),
        ('  description = "Name of the bucket"\n', ""),
        (
            '  description = "Name of the bucket"',
            '  description = "Name of the bucket"\n  sensitive = true',
        ),
    ],
}

# What the tutorial's own Terraform does (ai-on-gke/tutorials-and-examples, metaflow/terraform), one test each.
TUTORIAL: dict[str, tuple[rules.Rule, str, str]] = {
    "versions-with-at-least": (rules.everything_is_pinned, 'version = "6.50.0"', 'version = ">= 1.7.0"'),
    "manifest-over-http": (rules.everything_is_pinned, 'data "google_project" "this"', 'data "http" "this"'),
    "image-latest": (rules.everything_is_pinned, '"v4.0.6"', '"latest"'),
    "argo-acts-with-its-own-rights": (rules.argo_is_narrow, '["client"]', '["server"]'),
    "sqladmin-not-enabled": (rules.services_are_enabled_first, '    "sqladmin.googleapis.com",\n', ""),
    "artifactregistry-not-enabled": (rules.services_are_enabled_first, '    "artifactregistry.googleapis.com",\n', ""),
    "nothing-waits-for-the-apis": (
        rules.services_are_enabled_first,
        '"REGIONAL"\n\n  depends_on = [google_project_service.enabled]',
        '"REGIONAL"',
    ),
    "bucket-named-as-everything": (rules.names_do_not_collide, "    random_id.bucket.hex,\n", '    "bucket",\n'),
    "force-destroy": (rules.bucket_is_guarded, "force_destroy = !var.deletion_protection", "force_destroy = true"),
    "storage-role-on-the-project": (
        rules.rights_are_the_listed_ones,
        '"roles/logging.logWriter"',
        '"roles/storage.objectUser"',
    ),
    "authoritative-binding": (
        rules.rights_are_the_listed_ones,
        '_iam_member" "nodes_reader"',
        '_iam_binding" "nodes_reader"',
    ),
    "password-in-the-state": (
        rules.no_secret_in_the_state,
        'ephemeral "random_password" "database"',
        'resource "random_password" "database"',
    ),
    "public-nodes": (rules.clusters_are_hardened, "enable_private_nodes    = true", "enable_private_nodes    = false"),
    "no-deletion-protection": (
        rules.tearing_down_takes_one_switch,
        "deletion_protection = var.deletion_protection",
        "deletion_protection = false",
    ),
    "peering-blocks-destroy": (
        rules.network_is_closed,
        'deletion_policy = "ABANDON"\n\n  depends_on',
        "depends_on",
    ),
    "two-l4s-in-a-pool-of-one": (
        rules.node_pools_are_hardened,
        'machine_type     = "g2-standard-16"',
        'machine_type     = "g2-standard-24"',
    ),
    "no-a100-to-run-on": (
        rules.node_pools_are_hardened,
        'accelerator_type = "nvidia-tesla-a100"',
        'accelerator_type = "nvidia-l4"',
    ),
}
