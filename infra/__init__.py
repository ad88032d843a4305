"""How to run Requant for real, and local stand-ins for the services it talks to."""
