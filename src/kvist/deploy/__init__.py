"""Manifests of a Kvist cluster: from one typed description to YAML for Kubernetes or Compose."""
