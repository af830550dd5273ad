//! Images: references, pulls, OCI archives, unpacked layers.
