"""Deployment of Requant, benchmarks, and local stand-ins for the services that it uses."""
