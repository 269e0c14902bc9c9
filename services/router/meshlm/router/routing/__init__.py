"""From the name that a request asks for to the model that answers."""
