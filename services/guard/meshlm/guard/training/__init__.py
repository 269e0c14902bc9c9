"""Making the embedded model: data out of packages, without duplicates; two heads; an artefact. Not needed to serve."""
