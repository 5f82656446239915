"""The Ray Serve application: HTTP ingress, model deployments, language routing."""
