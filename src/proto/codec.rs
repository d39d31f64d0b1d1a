//! Codecs that use prost with initial buffer sizes other than tonic's 8 KiB. Each stream has one buffer for encoding
//! and one for decoding. Buffers grow as needed.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Codec for the public API, which has many streams of small messages. With larger buffers, the buffers would make up
/// most of a stream's memory.
pub(super) type SmallBufferCodec<Encode, Decode> = BufferCodec<Encode, Decode, 64>;

/// Codec for the worker protocol, which has one stream per worker. Its messages carry the tokens of all the worker's
/// sequences.
pub(super) type LargeBufferCodec<Encode, Decode> = BufferCodec<Encode, Decode, { 64 * 1024 }>;

/// Number of encoded bytes after which tonic passes the encoded messages on. This is also tonic's default.
const YIELD_THRESHOLD_BYTES: usize = 32 * 1024;

/// prost codec whose buffers have an initial capacity of `BYTES`.
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
