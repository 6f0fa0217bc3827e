"""The GKE path: what Terraform built, the manifests, the image, the flow on Argo, the server, and their end.

Everything here runs the tools that a person would run (terraform, gcloud, kubectl) and prints their
commands. What Terraform built is read in one place: `outputs`.
"""
