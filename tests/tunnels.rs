//! Verifies that an interface which unwraps what the filter cannot look into is reported by name,
//! until its port is protected or it is filtered itself.

use tests::net::{Host, ip};
use tests::{Lab, Plan};

#[test]
fn what_the_filter_cannot_look_into_is_reported_until_it_need_not() {
    let mut lab = Lab::start(&Plan::default());
    let namespace = lab.network.namespace(Host::Origin);
    let warnings = |lab: &Lab| lab.filter().status()["findings"].to_string();
    assert!(
        !warnings(&lab).contains("packets-unseen"),
        "{}",
        warnings(&lab)
    );

    let create = "link add vx0 type vxlan id 7 dstport 4789 local 203.0.113.10";
    let words: Vec<_> = ["-n", namespace.as_str()]
        .into_iter()
        .chain(create.split(' '))
        .collect();
    ip(&words);
    // As long as it is down, nothing comes in by it.
    assert!(
        !warnings(&lab).contains("packets-unseen"),
        "{}",
        warnings(&lab)
    );
    ip(&["-n", &namespace, "link", "set", "vx0", "up"]);

    // The filter runs since before it was there.
    let found = warnings(&lab);
    for word in [
        "`vx0` (VXLAN) unwraps",
        "filter.udp_ports = [4789]",
        "name `vx0`",
    ] {
        assert!(found.contains(word), "{word}: {found}");
    }
    let output = lab.pullgate(&["check"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("`vx0` (VXLAN) unwraps"), "{text}");

    lab.configure("udp_ports = [4789]");
    lab.reload();
    assert!(
        !warnings(&lab).contains("packets-unseen"),
        "{}",
        warnings(&lab)
    );
}
