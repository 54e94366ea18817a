"""The handlers that are shipped: storage formats, written against the public interface alone."""
