//! `tokenway tls`: creates certificates for trying TLS.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use jiff::civil::Date;
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose,
};

/// Commands for TLS.
#[derive(Subcommand)]
pub enum TlsCommand {
    /// Create certificates for trying TLS: of a new authority (ca.pem), of a server (server.pem, server.key) and of a
    /// client (client.pem, client.key). The authority's key is not kept. Existing files are not replaced
    SelfSigned(SelfSignedOptions),
}

#[derive(Args)]
pub struct SelfSignedOptions {
    /// Folder for the files. It is created if it does not exist
    #[arg(long, value_name = "FOLDER", default_value = "tls")]
    out: PathBuf,
    /// Host name or IP address of the server; may be repeated
    #[arg(
        long,
        value_name = "NAME",
        default_values = ["localhost", "127.0.0.1", "::1"]
    )]
    name: Vec<String>,
    /// Days until the certificates expire, 1 to 3650
    #[arg(long, value_name = "DAYS", default_value_t = 30, value_parser = clap::value_parser!(u16).range(1..=3650))]
    days: u16,
}

/// The files that `tokenway tls self-signed` creates.
const FILES: [&str; 5] = [
    "ca.pem",
    "server.pem",
    "server.key",
    "client.pem",
    "client.key",
];

/// Reason why the certificates were not created.
#[derive(Debug, thiserror::Error)]
pub enum TlsCommandError {
    /// A name is not valid.
    #[error("--name: {0}")]
    Name(rcgen::Error),
    /// The certificates could not be signed.
    #[error("cannot create a certificate: {0}")]
    Certificate(#[from] rcgen::Error),
    /// A file or the folder could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// Path of the file or folder.
        path: PathBuf,
        /// Error of the operating system.
        source: io::Error,
    },
}

/// Certificate and private key, in PEM.
struct Certified {
    certificate: String,
    key: String,
}

impl TlsCommand {
    /// Runs the command. Returns the text for standard output.
    ///
    /// # Errors
    /// A name is not valid, or a file exists or cannot be written.
    pub fn run(&self) -> Result<String, TlsCommandError> {
        match self {
            Self::SelfSigned(options) => options.run(),
        }
    }
}

impl SelfSignedOptions {
    fn run(&self) -> Result<String, TlsCommandError> {
        let authority = authority(self.days)?;
        let server = CertificateParams::new(self.name.clone()).map_err(TlsCommandError::Name)?;
        let server = self.sign(
            server,
            ("Tokenway server", ExtendedKeyUsagePurpose::ServerAuth),
            &authority,
        )?;
        let client = CertificateParams::new(Vec::new())?;
        let client = self.sign(
            client,
            ("Tokenway client", ExtendedKeyUsagePurpose::ClientAuth),
            &authority,
        )?;

        let out = &self.out;
        fs::create_dir_all(out).map_err(|source| write_error(out, source))?;
        // Certificates of different authorities must not be mixed.
        for name in FILES {
            let path = out.join(name);
            if path.exists() {
                return Err(write_error(&path, io::ErrorKind::AlreadyExists.into()));
            }
        }
        write_file(&out.join("ca.pem"), &authority.pem(), 0o644)?;
        for (name, Certified { certificate, key }) in [("server", server), ("client", client)] {
            write_file(&out.join(name).with_extension("pem"), &certificate, 0o644)?;
            write_file(&out.join(name).with_extension("key"), &key, 0o600)?;
        }
        let out = out.display();
        Ok(format!(
            "tokenway serve --tls-cert {out}/server.pem --tls-key {out}/server.key\n\
             tokenway complete --server https://localhost:8000 --tls-ca {out}/ca.pem \"Hello\"\n"
        ))
    }

    fn sign(
        &self,
        mut parameters: CertificateParams,
        (name, usage): (&str, ExtendedKeyUsagePurpose),
        authority: &CertifiedIssuer<'_, KeyPair>,
    ) -> Result<Certified, TlsCommandError> {
        set_subject(&mut parameters, name, self.days);
        parameters.extended_key_usages = vec![usage];
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let certificate = parameters.signed_by(&key, authority)?;
        Ok(Certified {
            certificate: certificate.pem(),
            key: key.serialize_pem(),
        })
    }
}

fn authority(days: u16) -> Result<CertifiedIssuer<'static, KeyPair>, rcgen::Error> {
    let mut parameters = CertificateParams::new(Vec::new())?;
    set_subject(&mut parameters, "Tokenway test authority", days);
    parameters.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    CertifiedIssuer::self_signed(parameters, KeyPair::generate()?)
}

/// Sets the name and the validity. The certificates are valid from yesterday, because clocks differ.
fn set_subject(parameters: &mut CertificateParams, name: &str, days: u16) {
    let today = Timestamp::now().to_zoned(TimeZone::UTC).date();
    let midnight = |date: Date| {
        let [month, day] = [date.month(), date.day()].map(i8::unsigned_abs);
        rcgen::date_time_ymd(date.year().into(), month, day)
    };
    parameters.distinguished_name.push(DnType::CommonName, name);
    parameters.not_before = midnight(today.saturating_sub(1.day()));
    parameters.not_after = midnight(today.saturating_add(i32::from(days).days()));
}

/// Writes a new file. Fails if there is one already.
fn write_file(path: &Path, text: &str, mode: u32) -> Result<(), TlsCommandError> {
    let mut options = fs::OpenOptions::new();
    let file = options.write(true).create_new(true).mode(mode).open(path);
    let written = file.and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|source| write_error(path, source))
}

fn write_error(path: &Path, source: io::Error) -> TlsCommandError {
    TlsCommandError::Write {
        path: path.to_owned(),
        source,
    }
}
