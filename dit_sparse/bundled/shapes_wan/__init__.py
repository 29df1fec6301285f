"""The bundled demo model `shapes-wan`: its scenes, its training, its judge."""
