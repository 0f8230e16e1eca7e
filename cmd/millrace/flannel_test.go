package main

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/millrace/millrace/agent"
	"github.com/millrace/millrace/layer/route"
	"github.com/millrace/millrace/source/kube/kubetest"
)

// annotated is a cluster whose API server takes patches of the Node n1's annotations, unless
// it forbids them.
type annotated struct {
	*clustered
	mu        sync.Mutex
	forbidden bool
	said      map[string]string
}

// flannels are the annotations of a Node of flannel.
func flannels(address, data string) map[string]string {
	const prefix = "flannel.alpha.coreos.com/"
	return map[string]string{prefix + "kube-subnet-manager": "true", prefix + "backend-type": "vxlan", prefix + "backend-data": data, prefix + "public-ip": address}
}

func nodeWith(i int, annotations map[string]string) string {
	text, err := json.Marshal(annotations)
	if err != nil {
		panic(err) // plain values
	}
	return fmt.Sprintf("---\napiVersion: v1\nkind: Node\nmetadata: {name: n%d, annotations: %s}\nspec: {podCIDRs: [10.244.%d.0/24]}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.%d}]}\n", i, text, i, i)
}

func newAnnotated(t *testing.T, said map[string]string) *annotated {
	a := &annotated{clustered: newClustered(t), said: said, forbidden: true}
	a.must(a.Apply(web("web", "10.96.0.2", "10.244.0.1") + nodeWith(1, said)))
	a.Fault(func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method != http.MethodPatch || r.URL.Path != "/api/v1/nodes/n1" {
			return false
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.forbidden {
			a.forbidden = false // the next one is not
			kubetest.Refuse(w, http.StatusForbidden, "Forbidden", "nodes is forbidden")
			return true
		}
		var patch struct {
			Metadata struct{ Annotations map[string]*string }
		}
		body, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(body, &patch); err != nil {
			t.Errorf("the patch is %s: %v", body, err)
		}
		for name, text := range patch.Metadata.Annotations {
			if delete(a.said, name); text != nil {
				a.said[name] = *text
			}
		}
		a.must(a.Apply(nodeWith(1, a.said)))
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"}}`)
		return true
	})
	return a
}

// says waits until the Node says something to flannel's nodes.
func (a *annotated) says(want string) {
	a.t.Helper()
	now := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		a.mu.Lock()
		now = a.said["flannel.alpha.coreos.com/backend-data"]
		a.mu.Unlock()
		if now == want {
			return
		}
	}
	a.t.Fatalf("the Node says %q, not %q:\n%s", now, want, a.log.String())
}

// With pods the agent has its Node speak to flannel's nodes as soon as its device is there,
// also where it may not at first, and no more than once; without pods it takes that off.
func TestNodeSpeaksToFlannel(t *testing.T) {
	a := newAnnotated(t, map[string]string{"other": "x"})
	a.must(a.Inside(func() error {
		out, err := exec.Command("sh", "-ec", "ip link add eth0 type veth peer name wire; ip link set wire up; ip addr add 192.0.2.1/24 dev eth0; ip link set eth0 up").CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}))
	a.begin("pods")
	a.until("the agent is ready", func(s agent.Status) bool { return s.Ready })
	a.says("")
	a.must(a.Apply(nodeWith(2, flannels("192.0.2.2", `{"VNI":7,"VtepMAC":"12:c6:65:89:b4:e3"}`))))
	a.says(`{"VNI":7,"Port":8472,"Millrace":true,"VtepMAC":"02:6d:c0:00:02:01"}`)
	if log := a.log.String(); !strings.Contains(log, "nodes is forbidden") || !strings.Contains(log, ownNodeRights) {
		t.Errorf("it was forbidden first, and the log is\n%s", log)
	}
	a.until("the way is VXLAN", func(s agent.Status) bool {
		at := slices.IndexFunc(s.Layers, func(l agent.LayerStatus) bool { return l.Name == "route" })
		return at >= 0 && s.Layers[at].Settings["port"] == fmt.Sprint(route.FlannelPort) && len(s.Layers[at].Degraded) == 0
	})
	a.kill()
	a.begin()
	a.until("an agent without pods is ready", func(s agent.Status) bool { return s.Ready })
	a.says("")
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.said) != 1 || a.said["other"] != "x" {
		t.Errorf("left is %v", a.said)
	}
}

// An agent without pods leaves what it has not written, to the letter: flannel's own words
// are others than those that would be written here, and some cannot be read here.
func TestWithoutPodsFlannelsWordsStay(t *testing.T) {
	const prefix, mark = "flannel.alpha.coreos.com/", `{"VNI":1,"Port":8472,"Millrace":true,"VtepMAC":"02:6d:c0:00:02:01"}`
	with := func(backend, data, address string) map[string]string {
		said := flannels(address, data)
		said[prefix+"backend-type"] = backend
		return said
	}
	unmanaged := flannels("192.0.2.1", mark)
	delete(unmanaged, prefix+"kube-subnet-manager")
	for what, row := range map[string]struct {
		said    map[string]string
		patched bool
	}{
		"wireguard":                      {with("wireguard", `{"PublicKey":"abc="}`, "192.0.2.1"), false},
		"host-gw":                        {with("host-gw", "null", "192.0.2.1"), false},
		"udp":                            {with("udp", "null", "192.0.2.1"), false},
		"vxlan, in another order":        {with("vxlan", `{"VtepMAC":"12:c6:65:89:b4:e3","VNI":1}`, "192.0.2.1"), false},
		"vxlan without hardware address": {with("vxlan", `{"VNI":1}`, "192.0.2.1"), false},
		"an address that is none":        {with("vxlan", mark, "n1"), false},
		"not for flannel":                {unmanaged, false},
		"nothing":                        {nil, false},
		"millrace's":                     {with("vxlan", mark, "192.0.2.1"), true},
		"millrace's for host-gw":         {with("host-gw", `{"Millrace":true}`, "192.0.2.1"), true},
	} {
		server, patched := kubetest.New(), false
		if err := server.Apply(nodeWith(1, row.said)); err != nil {
			t.Fatal(err)
		}
		server.Fault(func(w http.ResponseWriter, r *http.Request) bool {
			if r.Method == http.MethodPatch {
				patched = true
				w.Header().Set("Content-Type", "application/json")
				fmt.Fprint(w, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"}}`)
			}
			return r.Method == http.MethodPatch
		})
		web := httptest.NewServer(server)
		kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
		write(t, kubeconfig, "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: \""+web.URL+"\"}}]\ncontexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n")
		var log strings.Builder
		toFlannel(&wishes{source: "kube:" + kubeconfig}, "n1", nil, slog.New(slog.NewTextHandler(&log, nil)))(t.Context())
		web.Close()
		if patched != row.patched || strings.Contains(log.String(), "ERROR") {
			t.Errorf("%s: patched %v, not %v; the log is %q", what, patched, row.patched, log.String())
		}
	}
}
