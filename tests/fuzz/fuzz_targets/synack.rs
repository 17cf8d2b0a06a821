//! Whatever the bytes: what is found to be a SYN is one to etherparse, and its answer is a SYN-ACK with right checksums.
#![no_main]

use etherparse::{NetHeaders, PacketHeaders, TcpHeader, TransportHeader};
use filter_ebpf::synack::{self, Answer, Segment};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|frame: &[u8]| {
    let Some(segment) = Segment::find(frame) else {
        return;
    };
    let Some(syn) = segment.syn(frame) else {
        return;
    };
    let (tcp, _) = TcpHeader::from_slice(&frame[segment.tcp()..]).expect("a TCP header");
    assert!(tcp.syn && !tcp.ack && !tcp.fin && !tcp.rst);
    assert_eq!(segment.port(frame), Some(tcp.destination_port));
    let header = syn.header(frame).expect("a header");
    let header = header.map(u32::to_ne_bytes).concat();
    let (header, rest) = TcpHeader::from_slice(&header).expect("a TCP header");
    assert_eq!(
        (header.sequence_number, rest.len()),
        (tcp.sequence_number, 0)
    );

    // As the program does, where bpf_xdp_adjust_tail() leaves whatever was there before.
    let mut answer = frame.to_vec();
    answer.resize(syn.answer_length(), 0xaa);
    let says = Answer {
        cookie: tcp.sequence_number.rotate_left(7),
        mss: 1460,
    };
    synack::turn_ethernet(answer.first_chunk_mut().expect("addresses"));
    match segment {
        Segment::V4 { ip } => {
            synack::answer_v4(answer[ip..].first_chunk_mut().expect("a packet"), says);
        }
        Segment::V6 { ip } => {
            synack::answer_v6(answer[ip..].first_chunk_mut().expect("a packet"), says);
        }
    }
    let read = PacketHeaders::from_ethernet_slice(&answer).expect("a frame");
    let Some(TransportHeader::Tcp(read_tcp)) = read.transport else {
        panic!("no TCP");
    };
    let checksum = match read.net.expect("a packet") {
        NetHeaders::Ipv4(ip, _) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
            read_tcp.calc_checksum_ipv4(&ip, &[])
        }
        NetHeaders::Ipv6(ip, _) => read_tcp.calc_checksum_ipv6(&ip, &[]),
        NetHeaders::Arp(_) => panic!("no IP"),
    };
    assert_eq!(Ok(read_tcp.checksum), checksum);
    assert!(read_tcp.syn && read_tcp.ack);
    assert_eq!(read_tcp.sequence_number, says.cookie);
    assert_eq!(
        read_tcp.acknowledgment_number,
        tcp.sequence_number.wrapping_add(1)
    );
});
