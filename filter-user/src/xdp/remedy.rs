//! What helps against the famous refusals of drivers to take an XDP program natively.
//!
//! The texts are the kernel's own (NL_SET_ERR_MSG in the drivers). Each remedy was tried on the driver
//! that is named with it, or says that there is none but generic XDP.

use rustix::io::Errno;

use crate::host::netlink::{Interface, InterfaceKind};

/// Why the kernel does not attach a program natively.
pub(super) struct NativeRefusal<'a> {
    /// The number of the error.
    pub(super) errno: Option<Errno>,
    /// The kernel's own words.
    pub(super) words: Option<&'a str>,
    /// Where it was to be attached.
    pub(super) interface: &'a Interface,
    /// The interface that it is stacked on.
    pub(super) parent: Option<&'a str>,
}

/// What to do, if that is known.
pub(super) fn remedy(refusal: &NativeRefusal<'_>) -> Option<String> {
    let name = &refusal.interface.name;
    let words = refusal.words.unwrap_or_default().to_lowercase();
    let says = |parts: &[&str]| parts.iter().any(|part| words.contains(part));
    if let (InterfaceKind::Stacked, Some(parent)) = (refusal.interface.kind, refusal.parent) {
        return Some(format!(
            "it is stacked on `{parent}`: name that instead, where the filter sees the same frames \
             (it reads VLAN tags), together with those of the other interfaces on it"
        ));
    }
    if refusal.interface.kind == InterfaceKind::Bridge {
        return Some("a bridge has no driver, so generic XDP is what there is".to_owned());
    }
    // virtio_net, without the feature that lets a guest switch the offloads off.
    if says(&["host is implementing"]) {
        return Some(
            "only the hypervisor can change that (QEMU: `ctrl_guest_offloads=on`, or \
             `guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off`, at the \
             device); until then generic XDP is what there is"
                .to_owned(),
        );
    }
    if says(&["lro", "gro_hw", "gro-hw"]) {
        return Some(format!("`ethtool -K {name} lro off rx-gro-hw off`"));
    }
    // Each driver subtracts something else from a page: 3,498 bytes are left for most, 3,494 for
    // vmxnet3, less where cache lines are longer.
    if refusal.errno == Some(Errno::RANGE) || says(&["mtu", "too large", "frags", "single-buffer"])
    {
        return Some(format!(
            "the driver takes frames of one page only: `ip link set dev {name} mtu 3400`, or 1500"
        ));
    }
    // ixgbe has no text for more CPUs than twice its 64 queues (before Linux 5.15: than 64), bnxt none
    // for rings that it cannot reserve.
    if refusal.errno == Some(Errno::NOMEM) || says(&["queue", " ring", "channel"]) {
        return Some(format!(
            "XDP needs a transmit queue for each CPU: `ethtool -L {name} combined N` with half as \
             many as now; a card that has not enough for all CPUs of this host takes generic XDP only"
        ));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn famous_refusals_come_with_a_remedy() {
        let card = interface(InterfaceKind::Other);
        let helps = |errno, words| {
            let refusal = NativeRefusal {
                errno,
                words,
                interface: &card,
                parent: None,
            };
            remedy(&refusal).unwrap_or_default()
        };

        for (errno, words, remedy) in [
            (Some(Errno::RANGE), None, "mtu 3400"),
            (None, Some("MTU 9000 too large for XDP"), "mtu 3400"),
            (
                None,
                Some("single-buffer XDP requires MTU less than 3530"),
                "mtu 3400",
            ),
            (None, Some("LRO is not supported with XDP"), "lro off"),
            (
                Some(Errno::OPNOTSUPP),
                Some(
                    "Can't set XDP while host is implementing GRO_HW/CSUM, disable GRO_HW/CSUM first",
                ),
                "only the hypervisor",
            ),
            (Some(Errno::NOMEM), None, "generic XDP only"),
            (None, Some("not enough TX queues"), "ethtool -L eth0"),
            (None, Some("something else"), ""),
        ] {
            let helped = helps(errno, words);
            assert!(helped.contains(remedy), "{words:?}: {helped}");
            assert_eq!(helped.is_empty(), remedy.is_empty(), "{words:?}: {helped}");
        }
    }

    #[test]
    fn a_stacked_interface_names_its_parent() {
        let refusal = NativeRefusal {
            errno: Some(Errno::OPNOTSUPP),
            words: Some("Underlying driver does not support XDP in native mode"),
            interface: &interface(InterfaceKind::Stacked),
            parent: Some("eth7"),
        };

        assert!(remedy(&refusal).unwrap().contains("`eth7`"));
    }

    fn interface(kind: InterfaceKind) -> Interface {
        Interface {
            index: 2,
            name: "eth0".to_owned(),
            is_ethernet: true,
            kind,
            lower: None,
            controller: None,
            mtu: 1500,
            unwraps: None,
        }
    }
}
