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
