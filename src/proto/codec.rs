//! prost's codec with buffers of other sizes than tonic's 8 KiB, one for either direction on either side.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// For streams of which there are many, each of lone tokens: larger buffers would be most of what a stream takes.
/// They grow with the messages.
pub(super) type SmallBufferCodec<Encode, Decode> = BufferCodec<Encode, Decode, 256>;

/// For the one stream of a worker, whose messages are of all its sequences.
pub(super) type LargeBufferCodec<Encode, Decode> = BufferCodec<Encode, Decode, { 64 * 1024 }>;

/// Messages that are ready together are handed on once they are so many bytes. It is tonic's own.
const YIELD_THRESHOLD_BYTES: usize = 32 * 1024;

/// prost's codec with buffers that hold so many bytes at first.
#[derive(Debug)]
pub(super) struct BufferCodec<Encode, Decode, const BYTES: usize>(PhantomData<(Encode, Decode)>);

impl<Encode, Decode, const BYTES: usize> Default for BufferCodec<Encode, Decode, BYTES> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E, D, const BYTES: usize> Codec for BufferCodec<E, D, BYTES>
where
    E: Message + 'static,
    D: Message + Default + 'static,
{
    type Encode = E;
    type Decode = D;
    type Encoder = ProstEncoder<E>;
    type Decoder = ProstDecoder<D>;

    fn encoder(&mut self) -> ProstEncoder<E> {
        ProstCodec::<E, D>::raw_encoder(BufferSettings::new(BYTES, YIELD_THRESHOLD_BYTES))
    }

    fn decoder(&mut self) -> ProstDecoder<D> {
        ProstCodec::<E, D>::raw_decoder(BufferSettings::new(BYTES, YIELD_THRESHOLD_BYTES))
    }
}
