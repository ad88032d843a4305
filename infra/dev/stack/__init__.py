"""All services of Requant on one machine, without containers: `make up`, `make down`."""
