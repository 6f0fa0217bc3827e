# Exact versions: a provider release may change what a plan does, so moving one is a reviewed change.
# docs/versions.md says where each was read. Keep the .terraform.lock.hcl that `terraform init` writes.
terraform {
  # 1.11 is the first with write-only arguments, which keep the database password out of the state.
  required_version = ">= 1.11.0, < 2.0.0"

  required_providers {
    google = {
      source  = "hashicorp/google"
      version = "6.50.0"
    }
    helm = {
      source  = "hashicorp/helm"
      version = "3.1.1"
    }
    random = {
      source  = "hashicorp/random"
      version = "3.7.2"
    }
  }
}
