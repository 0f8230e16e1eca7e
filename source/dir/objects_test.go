package dir

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Objects of every kind are given, also of those that are not followed, in lists as well.
func TestObjects(t *testing.T) {
	folder := t.TempDir()
	for name, text := range map[string]string{
		"b.yaml":  "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: edge}\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: c}}\n",
		"a.json":  `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}`,
		"c.yaml":  "kind: [\n",
		"d.notes": "kind: Secret\n",
	} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, problems, err := Objects(folder)
	if err != nil {
		t.Fatal(err)
	}
	got := ""
	for _, o := range all {
		got += o.APIVersion + " " + o.Kind + " " + strings.Join(strings.Fields(string(o.JSON)), "") + "\n"
	}
	want := `v1 Service {"apiVersion":"v1","kind":"Service","metadata":{"name":"s"}}
gateway.networking.k8s.io/v1 Gateway {"apiVersion":"gateway.networking.k8s.io/v1","kind":"Gateway","metadata":{"name":"edge"}}
v1 ConfigMap {"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"c"}}
`
	if got != want {
		t.Errorf("got\n%s", got)
	}
	if len(problems) != 1 || !strings.HasSuffix(strings.Split(problems[0].Where, ":")[0], "c.yaml") {
		t.Errorf("problems %v", problems)
	}
	if _, _, err := Objects(filepath.Join(folder, "absent")); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Error(err)
	}
}
