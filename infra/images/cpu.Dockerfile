# Server, CPU worker and webhook relay. From the project's root: docker build -f infra/images/cpu.Dockerfile -t requant:cpu .
# TORCH_INDEX: an index of plain torch builds for the CPU saves 4 GB; without one, PyPI's build with CUDA is installed.
FROM python:3.11-slim-bookworm
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/work/cache PREFECT_HOME=/work/prefect
# Kubernetes starts flows without the command line, which would set these.
ENV DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
# The server unpacks its pages here: its user may not write into the installed package, where it does so otherwise.
ENV PREFECT_UI_STATIC_DIRECTORY=/var/lib/requant/ui
WORKDIR /requant
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
COPY requant requant
COPY flows flows
COPY tasks tasks
COPY infra infra
RUN pip install -c constraints.txt -e .
COPY deployments deployments
RUN useradd --create-home --uid 1000 requant && install -d -o requant /work /var/lib/requant/ui
USER requant
VOLUME /work
