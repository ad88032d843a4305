"""A local stand-in for the Hugging Face Hub.

It speaks the Hub's HTTP protocol to the real `huggingface_hub` client, keeps repositories in one folder, and fails on
demand (`infra.dev.hub.faults`). It listens on 127.0.0.1 only.

    python -m infra.dev.hub --state DIR --port 8080 --token hf_secret=me --seed me/tiny=models/tiny
    HF_ENDPOINT=http://127.0.0.1:8080 HF_TOKEN=hf_secret hf download me/tiny

Tests start it with `infra.dev.hub.launch.HubStandIn`. Its modules, from the disk upwards:

    tree.py             the files of a commit, and the operations that change them
    repository.py       one repository: objects, commits, refs, pull requests
    gitattributes.py    which files go to LFS
    card.py             the YAML at the top of a model card
    hub.py              all repositories, and who may use them
    seeding.py          commits made from local folders, without a client
    access.py           what a request may see and do; the errors that the client understands
    paging.py           long answers in pages
    repo_api.py         repositories: whoami, create, delete, settings, info
    refs_api.py         branches, tags, history
    content.py          tree listings and file downloads
    commits.py          preupload and commit
    lfs.py              uploads of large files, basic and multipart
    xet.py              what Xet stores: xorbs, and the files that their chunks make
    xet_api.py          tokens for Xet, and the requests to its storage
    discussions.py      pull requests
    collections_api.py  collections of repositories
    faults.py           failures on demand, and a log of the traffic
    admin.py            `/_standin/`: tokens, seeds, settings, faults, traffic
    app.py              all of it as one ASGI application
    __main__.py         the command line
    launch.py           `HubStandIn`: the command line as a context manager

Repository ids are always `namespace/name`.
"""
