package kube

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/millrace/millrace/model"
	"github.com/millrace/millrace/source/kube/kubetest"
)

const flannelMap = `---
apiVersion: v1
kind: ConfigMap
metadata: {name: kube-flannel-cfg, namespace: kube-flannel}
data:
  net-conf.json: |
    {"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "Port": 8473}}
`

// How flannel is configured comes, from where earlier manifests have it, too, changes, and goes.
func TestFlannelIsFollowed(t *testing.T) {
	b := newBed(t)
	var err error
	b.source, err = Open(Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{b.url}, Node: "n1", Flannel: true})
	if err != nil {
		t.Fatal(err)
	}
	b.apply(nodes + service("web", "10.96.0.2"))
	b.run()
	says := func(port uint16) func(*model.Snapshot) bool {
		return func(s *model.Snapshot) bool {
			return s.Complete && (s.Flannel == nil && port == 0 || s.Flannel != nil && s.Flannel.Port == port)
		}
	}
	b.until("there is none", says(0))
	b.apply(strings.ReplaceAll(strings.ReplaceAll(flannelMap, "namespace: kube-flannel", "namespace: kube-system"), "8473", "1"))
	b.until("an earlier one is read", says(1))
	b.apply(flannelMap)
	b.until("today's counts", says(8473))
	b.apply(strings.ReplaceAll(flannelMap, "8473", "8474"))
	b.until("a change comes", says(8474))
	if err := b.Remove(flannelMap); err != nil {
		t.Fatal(err)
	}
	b.until("it is gone, and the earlier one is not", says(1))
}

// A Node is made to say what it is to say, and nothing else of it is touched.
func TestSayToFlannel(t *testing.T) {
	const prefix = "flannel.alpha.coreos.com/"
	b := newBed(t)
	node := corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: "n1", ResourceVersion: "7",
		Annotations: map[string]string{"other": "x", prefix + "public-ip": "192.0.2.9", prefix + "public-ip-overwrite": "192.0.2.9"}}}
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}
	refused := false
	patches := 0
	b.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPatch && refused {
			kubetest.Refuse(w, http.StatusForbidden, metav1.StatusReasonForbidden, "no")
			return true
		}
		if r.Method == http.MethodPatch {
			patches++
			var patch struct {
				Metadata struct {
					ResourceVersion string
					Annotations     map[string]*string
				}
			}
			body, _ := io.ReadAll(r.Body)
			if err := json.Unmarshal(body, &patch); err != nil || patch.Metadata.ResourceVersion != "7" || r.URL.Path != "/api/v1/nodes/n1" {
				t.Errorf("%s: the patch is %s: %v", r.URL.Path, body, err)
			}
			for name, text := range patch.Metadata.Annotations {
				if delete(node.Annotations, name); text != nil {
					node.Annotations[name] = *text
				}
			}
		}
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(corev1.NodeList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "NodeList"}, Items: []corev1.Node{node}})
		return true
	})
	settings := Settings{Kubeconfig: kubeconfig(t, "http://192.0.2.1"), Servers: []string{"http://127.0.0.1:1", b.url}, Node: "n1"}
	say := func(want *model.Flannel) (bool, error) {
		return SayToFlannel(t.Context(), settings, func(_ *model.Flannel, addresses []netip.Addr) (*model.Flannel, bool) {
			if len(addresses) != 1 || addresses[0].String() != "192.0.2.1" {
				t.Errorf("its addresses are %v", addresses)
			}
			return want, true
		})
	}
	want := &model.Flannel{Backend: "vxlan", VNI: 1, Port: 8472, Millrace: true, MAC: [6]byte{2, 'm', 192, 0, 2, 1}, Address: netip.MustParseAddr("192.0.2.1")}
	refused = true
	if _, err := say(want); err == nil || errors.Is(err, ErrNoAnswer) || !strings.HasPrefix(err.Error(), "change flannel's annotations of Node n1 at "+b.url) {
		t.Errorf("forbidden: %v", err)
	}
	refused = false
	if changed, err := say(want); err != nil || !changed || patches != 1 {
		t.Errorf("said: %v, %v, %d patches", changed, err, patches)
	}
	for name, text := range map[string]string{"other": "x", prefix + "kube-subnet-manager": "true", prefix + "backend-type": "vxlan", prefix + "public-ip": "192.0.2.1",
		prefix + "backend-data": `{"VNI":1,"Port":8472,"Millrace":true,"VtepMAC":"02:6d:c0:00:02:01"}`, prefix + "public-ip-overwrite": "192.0.2.9"} {
		if node.Annotations[name] != text {
			t.Errorf("%s is %q, not %q", name, node.Annotations[name], text)
		}
	}
	if changed, err := say(want); err != nil || changed || patches != 1 {
		t.Errorf("again: %v, %v, %d patches", changed, err, patches)
	}
	if changed, err := say(nil); err != nil || !changed || len(node.Annotations) != 2 {
		t.Errorf("taken off: %v, %v, and there are %v", changed, err, node.Annotations)
	}
	settings.Servers = []string{"http://127.0.0.1:1"}
	if _, err := say(nil); !errors.Is(err, ErrNoAnswer) {
		t.Errorf("nobody there: %v", err)
	}
}
