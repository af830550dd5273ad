//! Why XDP leaves a packet that may be of a service's flow to tc; told with the feature `log`.

/// A reason; its number is its place in [`Self::ALL`].
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Pass {
    NoFlow,
    NotForDriver,
    NotOurs,
    NotCarried,
    Unfinished,
    Here,
}

#[cfg(feature = "log")]
impl Pass {
    pub const ALL: [Self; 6] = [
        Self::NoFlow,
        Self::NotForDriver,
        Self::NotOurs,
        Self::NotCarried,
        Self::Unfinished,
        Self::Here,
    ];

    /// The reason in words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::NoFlow => "no flow is known",
            Self::NotForDriver => "a flow of a pod, or a frame for somebody else",
            Self::NotOurs => "its backend has left, or it came by another way",
            Self::NotCarried => "too big for the way, or a header that is not plain",
            Self::Unfinished => "its checksum is still to be finished by a device",
            Self::Here => "it goes to a pod here, and the kernel may know its sum",
        }
    }
}
