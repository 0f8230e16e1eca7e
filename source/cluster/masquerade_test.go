package cluster

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func masqueradeMap(text string) *corev1.ConfigMap {
	return &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Namespace: MasqueradeConfigMap.Namespace, Name: MasqueradeConfigMap.Name},
		Data:       map[string]string{"config": text},
	}
}

// ip-masq-agent's configuration is read as it reads it, and a malformed one leaves what
// was said before in force.
func TestMasqueradeConfig(t *testing.T) {
	for _, row := range []struct{ text, want, problem string }{
		{"nonMasqueradeCIDRs:\n- 10.0.0.0/8\n- fd00::/8\nmasqLinkLocal: true\nresyncInterval: 60s\n", "[10.0.0.0/8 fd00::/8] true false", ""},
		{`{"nonMasqueradeCIDRs": ["172.16.0.0/12"], "masqLinkLocalIPv6": true, "cidrLimit": 64}`, "[172.16.0.0/12] false true", ""},
		{"NonMasqueradeCIDRs: [10.1.0.0/16]\n", "[10.1.0.0/16] false false", ""},
		{"", "[] false false", ""},
		{"nonMasqueradeCIDRs: []\n", "[] false false", ""},
		{"nonMasqueradeCIDRs: [10.1.2.0/16]\n", "[10.1.0.0/16] false false", "nonMasqueradeCIDRs[0]: 10.1.2.0/16 has bits set"},
		{"nonMasqueradeCIDRs: [10.0.0.0/8, 10.0.0.300/8]\n", "before", `nonMasqueradeCIDRs[1]: "10.0.0.300/8" is not a range`},
		{"nonMasqueradeCIDRs: [\"::ffff:10.0.0.0/104\"]\n", "before", "is an IPv4 range in IPv6 form"},
		{"nonMasqueradeCIDRs: 10.0.0.0/8\n", "before", "cannot unmarshal"},
		{"masqLinkLocal: maybe\n", "before", "cannot unmarshal"},
		{"- a list\n", "before", "read YAML"},
		{"nonMasqueradeCIDRs: [", "before", "read YAML"},
	} {
		c := New()
		must := func(err error) {
			if err != nil {
				t.Fatal(err)
			}
		}
		must(c.Set("api", masqueradeMap("nonMasqueradeCIDRs: [192.0.2.0/24]")))
		if m := c.Snapshot().Masquerade; m == nil || len(m.Not) != 1 {
			t.Fatalf("before: %+v", m)
		}
		must(c.Set("api", masqueradeMap(row.text)))
		s := c.Snapshot()
		got := "nothing"
		if m := s.Masquerade; m != nil {
			got = fmt.Sprint(m.Not, m.LinkLocal, m.LinkLocalIPv6)
		}
		if row.want == "before" {
			row.want = "[192.0.2.0/24] false false"
		}
		if got != row.want {
			t.Errorf("%q is %s, not %s", row.text, got, row.want)
		}
		var problems strings.Builder
		for _, p := range s.Problems {
			fmt.Fprintln(&problems, p.Error())
		}
		if said := problems.String(); (row.problem == "") != (said == "") || !strings.Contains(said, row.problem) {
			t.Errorf("%q: said %q, not %q", row.text, said, row.problem)
		} else if row.problem != "" && !strings.Contains(said, "ConfigMap kube-system/ip-masq-agent: data.config") {
			t.Errorf("%q: %q does not name the object", row.text, said)
		}
		c.Delete(Key{"ConfigMap", MasqueradeConfigMap})
		if s := c.Snapshot(); s.Masquerade != nil || len(s.Problems) > 0 || s.Unread != 0 {
			t.Errorf("%q: it is gone, and there are %+v, %v, %d", row.text, s.Masquerade, s.Problems, s.Unread)
		}
	}
}
