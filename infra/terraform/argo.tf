# Argo Workflows, from its Helm chart. Controller, server and the workflows themselves live in one namespace, so
# that Roles are enough: no ClusterRole, no ClusterRoleBinding. People reach the server with their own
# Kubernetes token (`client`), so it shows each of them what they may see anyway.
locals {
  argo_namespace = "argo"
  argo_version   = "v4.0.6"

  argo_pod_security = {
    runAsNonRoot   = true
    seccompProfile = { type = "RuntimeDefault" }
  }

  argo_container_security = {
    allowPrivilegeEscalation = false
    readOnlyRootFilesystem   = true
    runAsNonRoot             = true
    capabilities             = { drop = ["ALL"] }
    seccompProfile           = { type = "RuntimeDefault" }
  }

  argo_values = {
    # The server's service is `argo-server`, as in Argo's own manifests and the tutorial.
    fullnameOverride     = "argo"
    singleNamespace      = true
    createAggregateRoles = false

    images = {
      tag        = local.argo_version
      pullPolicy = "IfNotPresent"
    }

    # The full definitions are downloaded by a job during the install; these come with the chart.
    crds = {
      install = true
      keep    = true
      full    = false
    }

    # infra/kubernetes makes the account; this binds what a step needs to it: to report its result.
    workflow = {
      serviceAccount = {
        create = false
        name   = var.metaflow_argo_workflows_sa_name
      }
      rbac = {
        create           = true
        agentPermissions = false
        artifactGC       = false
      }
    }

    controller = {
      replicas           = 1
      workflowNamespaces = [local.argo_namespace]
      podSecurityContext = local.argo_pod_security
      securityContext    = local.argo_container_security
      logging            = { format = "json" }

      rbac = {
        create           = true
        accessAllSecrets = false
        secretWhitelist  = []
        writeConfigMaps  = false
      }

      clusterWorkflowTemplates = { enabled = false }

      # Finished workflows stay a week for those who ask what happened; their logs stay in Cloud Logging.
      workflowDefaults = {
        spec = {
          ttlStrategy = { secondsAfterCompletion = 604800 }
        }
      }

      resources = {
        requests = { cpu = "250m", memory = "512Mi" }
        limits   = { memory = "1Gi" }
      }
    }

    # Argo's own containers in each step. Autopilot refuses a pod of which one container asks for nothing.
    executor = {
      # Not read-only: Argo's own containers still write to their root (argo-workflows issue 10787).
      securityContext = {
        for key, value in local.argo_container_security : key => value if key != "readOnlyRootFilesystem"
      }

      resources = {
        requests = { cpu = "100m", memory = "128Mi" }
        limits   = { cpu = "500m", memory = "512Mi" }
      }
    }

    server = {
      enabled            = true
      replicas           = 1
      authModes          = ["client"]
      secure             = true
      serviceType        = "ClusterIP"
      podSecurityContext = local.argo_pod_security
      securityContext    = local.argo_container_security
      logging            = { format = "json" }

      ingress = { enabled = false }
      sso     = { enabled = false }

      clusterWorkflowTemplates = { enabled = false, enableEditing = false }

      # The chart's Role reads every secret of the namespace and deletes workflows. A server that acts with its
      # visitors' tokens needs neither; extraObjects has the Role that it does need.
      rbac = { create = false }

      resources = {
        requests = { cpu = "100m", memory = "256Mi" }
        limits   = { memory = "512Mi" }
      }
    }

    extraObjects = [
      {
        apiVersion = "rbac.authorization.k8s.io/v1"
        kind       = "Role"
        metadata   = { name = "argo-server", namespace = local.argo_namespace }
        rules = [
          {
            apiGroups = [""]
            resources = ["configmaps"]
            verbs     = ["get", "list", "watch"]
          },
          {
            apiGroups = ["argoproj.io"]
            resources = ["workflows", "workflowtemplates", "cronworkflows"]
            verbs     = ["get", "list", "watch"]
          },
        ]
      },
      {
        apiVersion = "rbac.authorization.k8s.io/v1"
        kind       = "RoleBinding"
        metadata   = { name = "argo-server", namespace = local.argo_namespace }
        roleRef    = { apiGroup = "rbac.authorization.k8s.io", kind = "Role", name = "argo-server" }
        subjects   = [{ kind = "ServiceAccount", name = "argo-server", namespace = local.argo_namespace }]
      },
    ]
  }
}

resource "helm_release" "argo_workflows" {
  name             = "argo-workflows"
  repository       = "https://argoproj.github.io/argo-helm"
  chart            = "argo-workflows"
  version          = "1.0.18"
  namespace        = local.argo_namespace
  create_namespace = true

  values = [yamlencode(local.argo_values)]

  # A release that did not come up is taken back whole. The first pods of a new Autopilot cluster wait for a node.
  atomic          = true
  cleanup_on_fail = true
  wait            = true
  timeout         = 900
  max_history     = 5

  # So that destroy takes the release first, while there is still a cluster to take it from.
  depends_on = [
    google_container_cluster.autopilot,
    google_container_cluster.standard,
    google_container_node_pool.system,
  ]
}
