//! prost's codec with small buffers.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// What an RPC's buffers hold at first, in bytes. tonic's 8 KiB, one for either direction on either
/// side, would be most of what a stream of lone tokens takes; they grow with the messages.
const BUFFER: usize = 256;

/// Messages that are ready together are handed on once they are so many bytes. It is tonic's own.
const YIELD: usize = 32 * 1024;

/// prost's codec with small buffers.
#[derive(Debug)]
pub(super) struct SmallBufferCodec<Encode, Decode>(PhantomData<(Encode, Decode)>);

impl<Encode, Decode> Default for SmallBufferCodec<Encode, Decode> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<E, D> Codec for SmallBufferCodec<E, D>
where
    E: Message + 'static,
    D: Message + Default + 'static,
{
    type Encode = E;
    type Decode = D;
    type Encoder = ProstEncoder<E>;
    type Decoder = ProstDecoder<D>;

    fn encoder(&mut self) -> ProstEncoder<E> {
        ProstCodec::<E, D>::raw_encoder(BufferSettings::new(BUFFER, YIELD))
    }

    fn decoder(&mut self) -> ProstDecoder<D> {
        ProstCodec::<E, D>::raw_decoder(BufferSettings::new(BUFFER, YIELD))
    }
}
