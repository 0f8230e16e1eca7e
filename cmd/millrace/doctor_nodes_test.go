package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
)

// nodesOnly is an API server of a cluster with these nodes and nothing else, and the
// kubeconfig for it. What it is asked for beside lists it keeps.
func nodesOnly(t *testing.T, names ...string) (kubeconfig string, asked *[]string) {
	t.Helper()
	asked = new([]string)
	web := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			*asked = append(*asked, r.Method+" "+r.URL.Path)
		}
		w.Header().Set("Content-Type", "application/json")
		switch r.URL.Path {
		case "/api/v1/pods":
			fmt.Fprint(w, `{"kind":"PodList","apiVersion":"v1","items":[]}`)
		case "/api/v1/nodes":
			var items []string
			for _, name := range names {
				items = append(items, fmt.Sprintf(`{"metadata":{"name":%q}}`, name))
			}
			fmt.Fprintf(w, `{"kind":"NodeList","apiVersion":"v1","items":[%s]}`, strings.Join(items, ","))
		default:
			w.WriteHeader(http.StatusNotFound)
		}
	}))
	t.Cleanup(web.Close)
	kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	write(t, kubeconfig, fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c}}]\nclusters: [{name: c, cluster: {server: %q}}]\n", web.URL))
	return kubeconfig, asked
}

// A cluster of which nothing may be seen is no reason to look at this node instead.
func TestDoctorOfNoNodes(t *testing.T) {
	kubeconfig, asked := nodesOnly(t)
	for _, args := range [][]string{{"--nodes", "all"}, {"pods", "x/y:z", "yes"}, {"pods", "x/y:z", "--dry-run"}} {
		stdout, stderr, status := millrace(t, append(append([]string{"doctor"}, args...), "--source", "kube:"+kubeconfig)...)
		if status != exitIncomplete || !strings.Contains(stderr, "the cluster has no nodes") || stdout != "" || len(*asked) > 0 {
			t.Errorf("%q: exit status %d, %q%q, asked for %q", args, status, stdout, stderr, *asked)
		}
	}
}

// Nodes without an agent are named, and what to do; no pod is made before somebody says
// so.
func TestDoctorOfNodesWithoutAgents(t *testing.T) {
	kubeconfig, asked := nodesOnly(t, "n1", "n2")
	for _, row := range []struct {
		args   []string
		status int
		says   string
	}{
		{[]string{"--nodes", "all"}, exitIncomplete, "node n2: no agent of millrace runs there: `millrace doctor pods IMAGE` looks without one"},
		{[]string{"--nodes", "n3"}, exitUsage, "--nodes n3: the cluster has no such node"},
		{[]string{"pods", "x/y:z"}, exitUsage, "pods on n1, n2 would be made, and nobody can be asked here: say yes after IMAGE"},
		{[]string{"pods", "x/y:z", "yes", "--nodes", "n2"}, exitIncomplete, "make pod kube-system/millrace-doctor-"},
	} {
		*asked = nil
		_, stderr, status := millrace(t, append(append([]string{"doctor"}, row.args...), "--source", "kube:"+kubeconfig)...)
		if status != row.status || !strings.Contains(stderr, row.says) {
			t.Errorf("%q: exit status %d, not %d; says %q, not %q", row.args, status, row.status, stderr, row.says)
		}
		if made := len(*asked) > 0; made != (row.args[len(row.args)-1] == "n2") {
			t.Errorf("%q: asked for %q", row.args, *asked)
		}
	}
	stdout, stderr, status := millrace(t, "doctor", "pods", "x/y:z", "--dry-run", "--for", "3s", "--only", "CT-01,DN-02", "--source", "kube:"+kubeconfig)
	var list struct {
		Kind  string
		Items []struct {
			Spec struct {
				NodeName              string
				ActiveDeadlineSeconds int
				Containers            []struct {
					Image string
					Args  []string
				}
			}
		}
	}
	if err := json.Unmarshal([]byte(stdout), &list); err != nil || status != exitOK || list.Kind != "List" || len(list.Items) != 2 {
		t.Fatalf("%v: exit status %d, %s%s", err, status, stdout, stderr)
	}
	spec := list.Items[1].Spec
	if args := strings.Join(spec.Containers[0].Args, " "); spec.NodeName != "n2" || spec.ActiveDeadlineSeconds != 63 || args != "doctor -o json --for 3s --severity info --only CT-01" {
		t.Errorf("%+v", spec)
	}
}

func TestAnswers(t *testing.T) {
	for text, want := range map[string]bool{"y\n": true, "Yes\n": true, " y ": true, "\n": false, "": false, "n\n": false, "yesterday\n": false} {
		if err := answerOf(strings.NewReader(text)); (err == nil) != want {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// A pod's log has progress before the report.
func TestFromBrace(t *testing.T) {
	for text, want := range map[string]string{
		"{\n}\n": "{\n}\n", "read {2} namespaces\n{\n}\n": "{\n}\n", "millrace: it failed\n": "millrace: it failed\n", "": "",
	} {
		if got, err := io.ReadAll(fromBrace([]byte(text))); err != nil || string(got) != want {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}
