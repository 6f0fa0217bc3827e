# The state stays in this folder unless this block is uncommented. Make the bucket by hand first, with
# versioning and without public access: Terraform cannot create the bucket that holds its own state.
#
# terraform {
#   backend "gcs" {
#     bucket = "<bucket_name>"
#     prefix = "terraform/state/metaflow"
#   }
# }
