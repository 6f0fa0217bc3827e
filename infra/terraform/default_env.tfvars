# The one value without which nothing works.
project_id = "<PROJECT_ID>"

# Several people in one project: each their own name, and nothing collides.
default_resource_name = "tuneship"

cluster_name      = "" # empty: default_resource_name
cluster_location  = "us-central1"
private_cluster   = true # no public address for the control plane; kubectl goes by the DNS endpoint
autopilot_cluster = true

network_name           = "" # empty: default_resource_name
subnetwork_name        = "" # empty: default_resource_name
subnetwork_region      = "us-central1"
subnetwork_cidr        = "10.128.0.0/20"
subnetwork_description = "Part of the Metaflow on GKE installation"

service_account_name = "" # the nodes'; empty: default_resource_name with -nodes
bucket_name          = "" # empty: default_resource_name; a random suffix follows in either case

metaflow_cloudsql_instance               = "" # empty: default_resource_name; a random suffix follows in either case
metaflow_cloudsql_instance_region        = "us-central1"
metaflow_kubernetes_namespace            = "metaflow"
metaflow_kubernetes_service_account_name = "metaflow-metadata"
metaflow_argo_workflows_sa_name          = "metaflow-argo"

# To tear down: set this to false, apply, then destroy. The bucket's contents go too.
deletion_protection = true
