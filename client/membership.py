"""How a hospital gets its folder and joins a lab.

FOLDER/site.yaml          what the hospital is and allows
FOLDER/manifest.csv       its images
FOLDER/state/             the worker's: ledger, approvals, releases, the hospital's signing key
FOLDER/node/              the node's, which has the network: its key, Flower's files, logs
FOLDER/membership.json    the lab's signed answer; no secret
"""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm

from client.site import SITE_FILE, load_site_config
from common.enrolment import Membership, make_node_key, public_line, read_membership, request_enrolment
from common.errors import Problem, UntrustedDocument, UsageError
from common.files import write_atomically
from common.keys import (
    SignedDocument,
    fingerprint,
    load_signing_key,
    make_signing_key,
    public_hex,
    read_private,
    read_signed,
    same_fingerprint,
    write_private,
)
from common.names import well_named

REQUEST_FILE, MEMBERSHIP_FILE = "enrolment-request.json", "membership.json"
NODE, NODE_KEY, SITE_KEY = "node", "node.key", "site.key"

_SITE_YAML = """\
# This hospital, and what it allows. `consilium-site data check .` checks it with the images.
name: {name}
manifest: manifest.csv  # path,label,patient; optional: mask, modality, split, age, sex, scanner
budget: {{epsilon: {epsilon:g}, delta: {delta:g}}}  # of a patient, over all studies; then fixed
limits:
  epsilon_per_study: {epsilon:g}
  min_patients: 20
  # tasks: [classification]      every kind, where it is left out
  # algorithms: [reptile]        every algorithm, where it is left out
  # hours: "19:00-07:00"         at any time, where it is left out
"""


def init_site(folder: Path, *, name: str, epsilon: float, delta: float) -> SignedDocument:
    """A hospital's folder with its keys, and its request to a lab; what is there already stays.

    Raises UsageError if the folder is another site's.
    """
    well_named(name)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / SITE_FILE).exists():
        text = _SITE_YAML.format(name=name, epsilon=epsilon, delta=delta)
        write_atomically(folder / SITE_FILE, text.encode())
        if not (folder / "manifest.csv").exists():
            write_atomically(folder / "manifest.csv", b"path,label,patient\n")
    config = load_site_config(folder)
    if config.name != name:
        raise UsageError(Problem(str(folder / SITE_FILE), f"is of site {config.name!r}, not {name!r}", "which is it?"))
    state, node = folder / config.state, folder / NODE
    for private in (state, node):
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not (node / NODE_KEY).exists():
        write_private(node / NODE_KEY, make_node_key()[0])
    if not (state / SITE_KEY).exists():
        make_signing_key(state / SITE_KEY)
    request = request_enrolment(name, node_key=_node_key(folder), site_key=load_signing_key(state / SITE_KEY))
    write_atomically(folder / REQUEST_FILE, request.to_json().encode())
    return request


def join(folder: Path, bundle: Path, *, expected: str) -> Membership:
    """Accept the lab's answer; `expected` is the fingerprint of its key, learned by another way.

    Raises UntrustedDocument if the bundle is not that lab's, or is not for this site and its keys.
    """
    document = read_signed(bundle)
    membership = read_membership(document)
    config = load_site_config(folder)
    if not same_fingerprint(expected, fingerprint(membership.lab_key)):
        what = f"it is signed by a key with the fingerprint {fingerprint(membership.lab_key)}, not {expected}"
        raise UntrustedDocument(Problem(str(bundle), what, "ask the lab again; do not join"))
    own = public_line(_node_key(folder))
    if (membership.site, membership.node_key) != (config.name, own):
        what = f"it is for site {membership.site!r} and its keys, not for those of {config.name!r} here"
        raise UntrustedDocument(Problem(str(bundle), what, "enroll with the request in this folder"))
    write_atomically(folder / MEMBERSHIP_FILE, document.to_json().encode())
    return membership


def membership_of(folder: Path) -> Membership:
    """The lab that the site in `folder` joined. Raises UsageError if it did not join one."""
    if not (folder / MEMBERSHIP_FILE).exists():
        raise UsageError(Problem(str(folder), "joined no lab yet", "`consilium-site join` the lab's bundle"))
    return read_membership(read_signed(folder / MEMBERSHIP_FILE))


def own_fingerprint(folder: Path) -> str:
    """Of the hospital's own key: what the lab compares."""
    return fingerprint(public_hex(load_signing_key(folder / load_site_config(folder).state / SITE_KEY)))


def _node_key(folder: Path) -> bytes:
    path = folder / NODE / NODE_KEY
    private = read_private(path)
    try:
        public_line(private)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise UsageError(Problem(str(path), "is no node's private key", "restore it from its backup")) from None
    return private
