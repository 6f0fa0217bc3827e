"""What Terraform built: `terraform output -json` as one frozen model. Nothing else here reads Terraform.

    terraform -chdir=infra/terraform output -json > outputs.json
    outputs = read(Path("outputs.json"))

A test holds the fields against infra/terraform/outputs.tf.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from tuneship.errors import InputError

Text = Annotated[str, StringConstraints(min_length=1)]


class Outputs(BaseModel):
    """The outputs of infra/terraform, under their names; outputs.tf says what each one is."""

    # Outputs that somebody adds to their own copy are theirs.
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    # The tutorial's.
    argo_workflows_k8s_sa_name: Text
    cloudsql_instance_name: Text
    finetune_image_registry_name: Text
    gke_cluster_location: Text
    gke_cluster_name: Text
    metaflow_datastore_bucket_name: Text
    metaflow_k8s_namespace: Text
    metaflow_k8s_sa_name: Text
    project_id: Text

    # Project and cluster.
    project_number: Text
    region: Text
    autopilot_cluster: bool
    gke_dns_endpoint: Text
    gke_get_credentials_command: Text
    gke_control_plane_cidr: Text
    nodes_cidr: Text
    pods_cidr: Text
    services_cidr: Text

    # Database.
    cloudsql_connection_name: Text
    cloudsql_private_ip: Text
    cloudsql_private_services_cidr: Text
    cloudsql_database_name: Text
    cloudsql_database_user: Text
    cloudsql_password_secret_id: Text

    # Storage, images, secrets.
    metaflow_datastore_sysroot_gs: Text
    checkpoint_root_uri: Text
    build_source_uri: Text
    image_registry_url: Text
    hub_token_secret_id: Text

    # Identities and namespaces.
    argo_namespace: Text
    argo_chart_version: Text
    argo_version: Text
    serving_k8s_namespace: Text
    serving_k8s_sa_name: Text
    nodes_service_account_email: Text
    metadata_service_account_email: Text
    training_service_account_email: Text
    serving_service_account_email: Text
    build_service_account_email: Text
    labels: dict[str, str]


def read(source: Path | str) -> Outputs:
    """The outputs from a file (a Path), or from the JSON itself (a str).

    Raises:
        InputError: no such file, not what `terraform output -json` prints, or an output is missing.
    """
    where = str(source) if isinstance(source, Path) else "terraform output -json"
    again = "terraform -chdir=infra/terraform output -json > outputs.json"
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
    except FileNotFoundError:
        raise InputError("no such file", where=where, fix=again) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", where=where, fix=again) from None
    try:
        tree = json.loads(text)
        found = {name: output["value"] for name, output in tree.items()}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
        raise InputError("not what `terraform output -json` prints", where=where, fix=again) from None
    if not found:
        raise InputError(
            "there are no outputs: nothing has been applied", where=where, fix="terraform apply, then: " + again
        )
    try:
        return Outputs.model_validate(found)
    except ValidationError as error:
        raise _readable(error, found, where) from None


def _readable(error: ValidationError, found: dict[str, object], where: str) -> InputError:
    """The first of pydantic's errors, with the outputs that are there and look like the missing one."""
    first, *rest = error.errors()
    name = ".".join(str(part) for part in first["loc"])
    more = f" ({len(rest)} more)" if rest else ""
    if first["type"] == "missing":
        unknown = found.keys() - Outputs.model_fields.keys()
        near = difflib.get_close_matches(name, sorted(unknown), n=1)
        return InputError(
            f"the output {name} is missing" + (f"; there is {near[0]}" if near else "") + more,
            where=where,
            fix="terraform apply with this version's infra/terraform, and write the outputs again",
        )
    return InputError(f"the output {name}: {first['msg'][0].lower()}{first['msg'][1:]}{more}", where=where)
