package dir

import (
	"strings"
	"testing"
)

// Of ConfigMaps the one of CoreDNS is read, wherever it stands; others count as passed over.
func TestCorefileOfAFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	const other = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: shop}\ndata: {Corefile: \".\"}\n"
	write(t, "other.yaml", other)
	s := readAll(t, ".")
	if s.DNS != nil || s.Ignored["ConfigMap"] != 1 || s.Unread > 0 {
		t.Errorf("DNS %+v, ignored %v, unread %d", s.DNS, s.Ignored, s.Unread)
	}
	write(t, "dns.yaml", other+"---\napiVersion: v1\nkind: ConfigMap\nmetadata: {name: coredns, namespace: kube-system}\ndata:\n  Corefile: |\n    .:53 {\n      kubernetes cluster.local\n      hosts\n    }\n")
	s = readAll(t, ".")
	if s.DNS == nil || s.DNS.Zone != "cluster.local" || !strings.HasPrefix(s.DNS.Left, "Corefile:3: hosts") || s.Ignored["ConfigMap"] != 2 || len(s.Problems) > 0 {
		t.Errorf("DNS %+v, ignored %v, problems %v", s.DNS, s.Ignored, s.Problems)
	}
	write(t, "dns.yaml", other)
	if s = readAll(t, "."); s.DNS != nil {
		t.Errorf("DNS %+v after it is gone", s.DNS)
	}
}

// That of ip-masq-agent is read, too; one that is malformed leaves what was said before.
func TestMasqueradeOfAFolder(t *testing.T) {
	t.Chdir(t.TempDir())
	const config = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: ip-masq-agent, namespace: kube-system}\ndata:\n  config: |\n    nonMasqueradeCIDRs: [10.0.0.0/8]\n"
	write(t, "masq.yaml", config)
	s := readAll(t, ".")
	if s.Masquerade == nil || len(s.Masquerade.Not) != 1 || len(s.Problems) > 0 || s.Unread > 0 {
		t.Errorf("masquerade %+v, problems %v", s.Masquerade, s.Problems)
	}
	write(t, "masq.yaml", strings.ReplaceAll(config, "10.0.0.0/8", "10.0.0.0/99"))
	if s = readAll(t, "."); s.Masquerade != nil || s.Unread != 1 || len(s.Problems) != 1 || !strings.HasPrefix(s.Problems[0].Error(), "masq.yaml:5: ConfigMap kube-system/ip-masq-agent: data.config") {
		t.Errorf("masquerade %+v, unread %d, problems %v", s.Masquerade, s.Unread, s.Problems)
	}
}
