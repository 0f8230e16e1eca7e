package cluster

import (
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/model"
)

// flannelNode is a Node with annotations of flannel, without their prefix.
func flannelNode(said ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Annotations: map[string]string{}}}
	for i := 0; i < len(said); i += 2 {
		n.Annotations["flannel.alpha.coreos.com/"+said[i]] = said[i+1]
	}
	return n
}

// What flannel writes is understood; what it cannot have written is a problem that names
// Node and annotation, and the Node is one as any other.
func TestFlannelAnnotations(t *testing.T) {
	const data, ours = `{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}`, `{"VNI":1,"Port":8472,"Millrace":true,"VtepMAC":"02:6d:c0:00:02:01"}`
	for _, row := range []struct {
		what          string
		node          *corev1.Node
		want, problem string
	}{
		{"nothing", flannelNode(), "<nil>", ""},
		{"vxlan", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", data, "public-ip", "192.0.2.1"),
			"vxlan 1 12c66589b4e3 000000000000 192.0.2.1 invalid IP false 0", ""},
		{"both families", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", data, "public-ip", "192.0.2.1",
			"backend-v6-data", `{"VNI":1,"VtepMAC":"6a:00:00:00:00:01"}`, "public-ipv6", "2001:db8::1"), "vxlan 1 12c66589b4e3 6a0000000001 192.0.2.1 2001:db8::1 false 0", ""},
		{"millrace's, both families", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", ours, "public-ip", "192.0.2.1",
			"backend-v6-data", ours, "public-ipv6", "2001:db8::1"), "vxlan 1 026dc0000201 026dc0000201 192.0.2.1 2001:db8::1 true 8472", ""},
		{"flannel is back, over IPv4", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", data, "public-ip", "192.0.2.1",
			"backend-v6-data", ours, "public-ipv6", "2001:db8::1"), "vxlan 1 12c66589b4e3 000000000000 192.0.2.1 invalid IP false 0", ""},
		{"flannel is back, over IPv6", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", ours, "public-ip", "192.0.2.1",
			"backend-v6-data", data, "public-ipv6", "2001:db8::1"), "vxlan 1 000000000000 12c66589b4e3 invalid IP 2001:db8::1 false 0", ""},
		{"flannel is back, with host-gw", flannelNode("kube-subnet-manager", "true", "backend-type", "host-gw", "backend-data", "null", "public-ip", "192.0.2.1",
			"backend-v6-data", `{"Millrace":true}`, "public-ipv6", "2001:db8::1"), "host-gw 0 000000000000 000000000000 192.0.2.1 invalid IP false 0", ""},
		{"flannel is back, with another backend", flannelNode("kube-subnet-manager", "true", "backend-type", "wireguard", "backend-data", `{"PublicKey":"x"}`, "public-ip", "192.0.2.1",
			"backend-v6-data", ours, "public-ipv6", "2001:db8::1"), "wireguard 0 000000000000 000000000000 192.0.2.1 invalid IP false 0", ""},
		{"host-gw", flannelNode("kube-subnet-manager", "true", "backend-type", "host-gw", "backend-data", "null", "public-ip", "192.0.2.1"),
			"host-gw 0 000000000000 000000000000 192.0.2.1 invalid IP false 0", ""},
		{"another backend", flannelNode("kube-subnet-manager", "true", "backend-type", "wireguard", "backend-data", `{"PublicKey":"x"}`, "public-ip", "192.0.2.1"),
			"wireguard 0 000000000000 000000000000 192.0.2.1 invalid IP false 0", ""},
		{"not by Kubernetes", flannelNode("backend-type", "vxlan", "backend-data", data, "public-ip", "192.0.2.1"), "<nil>", ""},
		{"no hardware address", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", "null", "public-ip", "192.0.2.1"), "<nil>",
			"Node n1: metadata.annotations[flannel.alpha.coreos.com/backend-data]: it has no VtepMAC"},
		{"no JSON", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", "{", "public-ip", "192.0.2.1"), "<nil>", "is not what flannel writes"},
		{"a group", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", `{"VNI":1,"VtepMAC":"13:c6:65:89:b4:e3"}`), "<nil>", `VtepMAC "13:c6:65:89:b4:e3" is no`},
		{"a network of 0", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", `{"VtepMAC":"12:c6:65:89:b4:e3"}`), "<nil>", "VNI 0 is out of range"},
		{"a network of -1", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", `{"VNI":-1,"VtepMAC":"12:c6:65:89:b4:e3"}`), "<nil>", "is not what flannel writes"},
		{"a large network", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", `{"VNI":16777216,"VtepMAC":"12:c6:65:89:b4:e3"}`), "<nil>", "VNI 16777216 is out of range"},
		{"no address", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", data, "public-ip", "n1"), "<nil>", `public-ip]: "n1" is no address`},
		{"an address of the other family", flannelNode("kube-subnet-manager", "true", "backend-type", "vxlan", "backend-data", data, "public-ip", "2001:db8::1"), "<nil>", "of that family"},
	} {
		c := New()
		must(t, c.Set("api", row.node))
		s := c.Snapshot()
		got := "<nil>"
		if f := s.Nodes[0].Flannel; f != nil {
			got = fmt.Sprintf("%s %d %x %x %v %v %v %d", f.Backend, f.VNI, f.MAC, f.MAC6, f.Address, f.Address6, f.Millrace, f.Port)
		}
		if got != row.want {
			t.Errorf("%s: read %s, not %s", row.what, got, row.want)
		}
		said := ""
		if len(s.Problems) > 0 {
			said = s.Problems[0].Error()
		}
		if (said == "") != (row.problem == "") || !strings.Contains(said, row.problem) || s.Unread > 0 {
			t.Errorf("%s: said %q, not %q; %d unread", row.what, said, row.problem, s.Unread)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// What is written for flannel's nodes is read back, and flannel that begins on the node
// finds its hardware address in it.
func TestFlannelAnnotationsAreReadBack(t *testing.T) {
	both := &model.Flannel{Backend: "vxlan", VNI: 4096, Port: 4789, Millrace: true, MAC: [6]byte{2, 'm', 192, 0, 2, 1}, MAC6: [6]byte{2, 'm', 192, 0, 2, 1},
		Address: netip.MustParseAddr("192.0.2.1"), Address6: netip.MustParseAddr("2001:db8::1")}
	flannels := *both
	flannels.Port, flannels.Millrace, flannels.Address6, flannels.MAC6 = 0, false, netip.Addr{}, [6]byte{}
	for _, f := range []*model.Flannel{both, &flannels, {Backend: "host-gw", Millrace: true, Address: netip.MustParseAddr("192.0.2.1")}} {
		n := flannelNode()
		maps.Copy(n.Annotations, AnnotationsOf(f))
		for name := range n.Annotations {
			if !strings.HasPrefix(name, flannelPrefix) {
				t.Errorf("%s is not flannel's", name)
			}
		}
		c := New()
		must(t, c.Set("api", n))
		s := c.Snapshot()
		if back := s.Nodes[0].Flannel; back == nil || *back != *f || len(s.Problems) > 0 {
			t.Errorf("%+v became %v, and that %+v: %v", f, n.Annotations, back, s.Problems)
		}
		if f.Backend != "vxlan" {
			continue
		}
		// (*kubeSubnetManager).GetStoredMacAddresses of flannel v0.28
		parts := strings.Split(strings.Trim(n.Annotations[flannelData], "\"}"), ":\"")
		if len(parts) != 2 || parts[1] != "02:6d:c0:00:02:01" {
			t.Errorf("flannel would find %q in %s", parts, n.Annotations[flannelData])
		}
	}
	if said := AnnotationsOf(&flannels)[flannelData]; said != `{"VNI":4096,"VtepMAC":"02:6d:c0:00:02:01"}` {
		t.Errorf("flannel itself writes otherwise: %s", said)
	}
	if said := AnnotationsOf(nil); said != nil {
		t.Errorf("of nothing is said %v", said)
	}
}

// flannel's configuration is read as flannel reads it.
func TestFlannelNetwork(t *testing.T) {
	for _, row := range []struct{ text, want, problem string }{
		{`{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}`, "{0 0 false}", ""},
		{`{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "VNI": 4096, "Port": 4789, "DirectRouting": true}}`, "{4096 4789 true}", ""},
		{`{"Network": "10.244.0.0/16", "backend": {"type": "vxlan", "port": 8473}}`, "{0 8473 false}", ""},
		{`{"Network": "10.244.0.0/16"}`, "{0 0 false}", ""},
		{`{"Backend": {"Port": 70000}}`, "before", "Backend.Port 70000 is out of range"},
		{`{"Backend": {"VNI": 16777216}}`, "before", "Backend.VNI 16777216 is out of range"},
		{`{"Backend": {"VNI": -1}}`, "before", "Backend.VNI -1 is out of range"},
		{`{"Backend": `, "before", "read JSON"},
	} {
		config := func(i int, text string) *corev1.ConfigMap {
			return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: FlannelConfigMaps[i].Namespace, Name: FlannelConfigMaps[i].Name}, Data: map[string]string{"net-conf.json": text}}
		}
		c := New()
		must(t, c.Set("api", config(1, `{"Backend": {"Port": 2}}`)))
		if s := c.Snapshot(); s.Flannel == nil || s.Flannel.Port != 2 {
			t.Fatalf("that of earlier manifests: %+v", s.Flannel)
		}
		must(t, c.Set("api", config(0, `{"Backend": {"Port": 1}}`)))
		must(t, c.Set("api", config(0, row.text)))
		s := c.Snapshot()
		if row.want == "before" {
			row.want = "{0 1 false}"
		}
		if got := fmt.Sprint(*s.Flannel); got != row.want {
			t.Errorf("%s is %s, not %s", row.text, got, row.want)
		}
		said := ""
		for _, p := range s.Problems {
			said += p.Error()
		}
		if (said == "") != (row.problem == "") || !strings.Contains(said, row.problem) {
			t.Errorf("%s: said %q, not %q", row.text, said, row.problem)
		}
		c.Delete(Key{"ConfigMap", FlannelConfigMaps[0]})
		c.Delete(Key{"ConfigMap", FlannelConfigMaps[1]})
		if s := c.Snapshot(); s.Flannel != nil || len(s.Problems) > 0 {
			t.Errorf("%s: it is gone, and there is %+v, %v", row.text, s.Flannel, s.Problems)
		}
	}
}
