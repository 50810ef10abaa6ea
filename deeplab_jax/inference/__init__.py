"""From photographs to labels: network and CRF of a workdir or an artifact, in pieces, files and videos."""
