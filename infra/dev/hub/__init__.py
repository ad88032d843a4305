"""A local stand-in for the Hugging Face Hub.

It speaks the real protocol to the real `huggingface_hub` client, keeps its state in one folder
that survives a SIGKILL at any moment, and can be told to misbehave (`infra.dev.hub.faults`).

    python -m infra.dev.hub --state DIR --port 8080 --token hf_secret=me --seed me/tiny=models/tiny
    HF_ENDPOINT=http://127.0.0.1:8080 HF_HUB_DISABLE_XET=1 HF_TOKEN=hf_secret hf download me/tiny

Tests start it with `infra.dev.hub.launch.HubStandIn`. What it is made of, from the disk upwards:

    durable.py        files that are either there, whole and synced, or not there
    tree.py           what a commit holds, and what operations make of it
    repository.py     one repository: objects, commits, refs
    gitattributes.py  which files go to LFS
    card.py           the YAML at the top of a model card
    hub.py            all repositories, and who may use them
    seeding.py        folders that become commits, without a client
    access.py         what a request may see and do; the errors the client understands
    paging.py         long answers in pages
    repo_api.py       repositories: whoami, create, delete, settings, info
    refs_api.py       branches, tags, history
    content.py        tree listings and file downloads
    commits.py        preupload and commit
    lfs.py            uploads of large files, basic and multipart
    discussions.py    pull requests
    collections_api.py  collections of repositories
    faults.py         failures on demand, and a log of the traffic
    admin.py          `/_standin/`: tokens, seeds, settings, faults, traffic
    app.py            all of it as one ASGI application
    __main__.py       the command line
    launch.py         `HubStandIn`: the command line as a context manager

Xet is not spoken: set `HF_HUB_DISABLE_XET=1`. Repository ids are always `namespace/name`.
"""
