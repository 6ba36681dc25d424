# The local platform, for compose.yaml. It is for trying things out: its keys are in its volume.
ARG PYTHON_IMAGE=docker.io/library/python:3.12-slim-bookworm
FROM ${PYTHON_IMAGE}
WORKDIR /src
COPY . .
RUN python3 -m venv /opt/platform \
    && /opt/platform/bin/pip install --no-cache-dir --find-links wheels "sekuire[local]" \
    && install -d -m 0755 -o 10001 -g 10001 /var/lib/platform
ENV PATH=/opt/platform/bin:$PATH PYTHONDONTWRITEBYTECODE=1
WORKDIR /var/lib/platform
USER 10001:10001
VOLUME /var/lib/platform
EXPOSE 9300
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=2s --timeout=5s --retries=15 \
    CMD ["python3", "-c", "import socket; socket.create_connection(('127.0.0.1', 9300), 2).close()"]
ENTRYPOINT ["sekuire", "dev"]
CMD ["--host", "0.0.0.0"]
