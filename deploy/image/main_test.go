package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An archive is read back as a container runtime reads it: from its index, by
// digests. Made twice it is the same.
func TestImageHasEachArchitecturesBinary(t *testing.T) {
	first, again := bake(t), bake(t)
	if !bytes.Equal(first, again) {
		t.Error("the same binaries gave two images")
	}
	archive := untar(t, first)
	var top struct {
		Manifests []struct {
			Digest      string
			Annotations map[string]string
		}
	}
	decode(t, archive["index.json"], &top)
	if name := top.Manifests[0].Annotations["io.containerd.image.name"]; name != "example.com:443/millrace:v1" {
		t.Errorf("the image is called %q", name)
	}
	var index struct {
		Manifests []struct {
			Digest   string
			Platform struct{ Architecture string }
		}
	}
	decode(t, archive[blob(top.Manifests[0].Digest)], &index)
	if len(index.Manifests) != 2 {
		t.Fatalf("images of %d architectures", len(index.Manifests))
	}
	for _, m := range index.Manifests {
		var manifest struct {
			Config struct{ Digest string }
			Layers []struct{ Digest string }
		}
		decode(t, archive[blob(m.Digest)], &manifest)
		var configuration struct {
			Architecture string
			Config       struct{ Entrypoint []string }
		}
		decode(t, archive[blob(manifest.Config.Digest)], &configuration)
		if configuration.Architecture != m.Platform.Architecture || configuration.Config.Entrypoint[0] != "/millrace" {
			t.Errorf("image for %s is configured as %+v", m.Platform.Architecture, configuration)
		}
		packed, err := gzip.NewReader(bytes.NewReader(archive[blob(manifest.Layers[0].Digest)]))
		if err != nil {
			t.Fatal(err)
		}
		layer, err := io.ReadAll(packed)
		if err != nil {
			t.Fatal(err)
		}
		inside := untar(t, layer)
		if got := string(inside["millrace"]); got != "for "+m.Platform.Architecture {
			t.Errorf("the image for %s holds the binary %q", m.Platform.Architecture, got)
		}
		if len(inside["licences/LICENSE"]) == 0 || len(inside["licences/LICENSES/MIT.txt"]) == 0 {
			t.Errorf("the image for %s lacks licences: it holds %d files", m.Platform.Architecture, len(inside))
		}
	}
}

// What is applied to a cluster names the image that was made, and its service
// account is the one that has the rights.
func TestManifestsNameTheImage(t *testing.T) {
	to := t.TempDir()
	follow(t, to)
	for _, name := range []string{"millrace.yaml", "millrace-pods.yaml", "millrace-remove.yaml", "millrace-tune.yaml"} {
		content, err := os.ReadFile(filepath.Join(to, name))
		if err != nil {
			t.Fatal(err)
		}
		manifest := string(content)
		if strings.Contains(manifest, "TAG") || !strings.Contains(manifest, "image: example.com:443/millrace:v1\n") {
			t.Errorf("%s does not name the image:\n%s", name, manifest)
		}
		if strings.Contains(manifest, "privileged: true") {
			t.Errorf("%s asks for a privileged container", name)
		}
		pods := strings.Contains(manifest, "            - agent\n            - pods\n") && strings.Contains(manifest, "\n            - {name: plugins, mountPath: /host/opt/cni/bin}\n") &&
			strings.Contains(manifest, "\n        - name: plugins\n          hostPath: {path: /opt/cni/bin")
		if pods != (name == "millrace-pods.yaml") {
			t.Errorf("of %s it is %v that it is for the pod network:\n%s", name, pods, manifest)
		}
		// Paths between nodes are measured through raw sockets, and nothing else takes them.
		if raw := strings.Contains(manifest, "\n                - SYSLOG\n                - NET_RAW\n"); raw != pods {
			t.Errorf("of %s it is %v that the agent may open raw sockets:\n%s", name, raw, manifest)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(to, "image-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func TestTagIsNotAPort(t *testing.T) {
	for name, want := range map[string]string{
		"example.com/millrace:v1": "v1", "example.com:443/millrace:v1": "v1", "millrace:v1": "v1",
		"example.com:443/millrace": "", "millrace": "",
	} {
		if _, tag, _ := cutTag(name); tag != want {
			t.Errorf("%s has the tag %q, not %q", name, tag, want)
		}
	}
}

func bake(t *testing.T) []byte {
	t.Helper()
	to := t.TempDir()
	follow(t, to)
	content, err := os.ReadFile(filepath.Join(to, "millrace-image.tar"))
	if err != nil {
		t.Fatal(err)
	}
	return content
}

func follow(t *testing.T, to string) {
	t.Helper()
	var binaries []string
	for _, architecture := range []string{"amd64", "arm64"} {
		file := filepath.Join(t.TempDir(), architecture)
		if err := os.WriteFile(file, []byte("for "+architecture), 0o600); err != nil {
			t.Fatal(err)
		}
		binaries = append(binaries, architecture+"="+file)
	}
	r := recipe{name: "example.com:443/millrace:v1", manifests: "..", licences: "../..", to: to}
	if err := r.make(binaries); err != nil {
		t.Fatal(err)
	}
}

func blob(digest string) string { return "blobs/" + strings.Replace(digest, ":", "/", 1) }

func untar(t *testing.T, content []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	archive := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := archive.Next()
		if err == io.EOF {
			return files
		}
		if err == nil {
			files[header.Name], err = io.ReadAll(archive)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func decode(t *testing.T, content []byte, into any) {
	t.Helper()
	if err := json.Unmarshal(content, into); err != nil {
		t.Fatalf("%v: %s", err, content)
	}
}
