// Image makes the container image of millrace and the manifests that name it, from
// static binaries: no Docker, no registry and no root are needed.
//
//	image --name ghcr.io/millrace/millrace:v1 --manifests deploy --to dist amd64=FILE arm64=FILE
//
// It writes five files to the folder of --to: millrace-image.tar, an OCI archive
// for all architectures that are named, which containerd, Podman, skopeo, crane and
// Docker read; millrace.yaml, millrace-pods.yaml, millrace-remove.yaml and
// millrace-tune.yaml, what is applied to a cluster.
// The same binaries give the same image, byte by byte: nothing in it has a time.
// It is run by `make image`, and costs a second for 40 MB of binary.
package main

import (
	"archive/tar"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	registry "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

func main() {
	var r recipe
	flag.StringVar(&r.name, "name", "", "the image's name with its tag")
	flag.StringVar(&r.manifests, "manifests", "deploy", "folder of the manifests")
	flag.StringVar(&r.to, "to", "dist", "folder for what is made")
	flag.StringVar(&r.licences, "licences", ".", "folder with LICENSE, NOTICE and LICENSES")
	flag.Parse()
	if err := r.make(flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// recipe says what goes in and where what is made goes.
type recipe struct{ name, manifests, licences, to string }

// make the image of binaries, "amd64=dist/millrace-amd64", and the manifests.
func (r recipe) make(binaries []string) error {
	repository, tag, tagged := cutTag(r.name)
	if !tagged || len(binaries) == 0 {
		return errors.New("say --name REPOSITORY:TAG and ARCHITECTURE=FILE")
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, binary := range binaries {
		architecture, file, _ := strings.Cut(binary, "=")
		image, err := r.image(architecture, file)
		if err != nil {
			return fmt.Errorf("make image for %s: %w", architecture, err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: image, Descriptor: registry.Descriptor{
			Platform: &registry.Platform{OS: "linux", Architecture: architecture},
		}})
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	if err := writeArchive(index, filepath.Join(r.to, "millrace-image.tar"), r.name, tag); err != nil {
		return err
	}
	fmt.Printf("%s  %s@%s\n", filepath.Join(r.to, "millrace-image.tar"), repository, digest)
	return r.writeManifests()
}

// cutTag takes "ghcr.io:443/millrace:v1" apart at the last colon, if that is not
// one of a port.
func cutTag(name string) (repository, tag string, ok bool) {
	i := strings.LastIndexByte(name, ':')
	if i < 0 || strings.ContainsRune(name[i:], '/') {
		return name, "", false
	}
	return name[:i], name[i+1:], true
}

// image of one architecture: the binary, and the licences that go with it.
func (r recipe) image(architecture, binary string) (registry.Image, error) {
	content, err := r.layer(binary)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	image := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
	image, err = mutate.AppendLayers(image, layer)
	if err != nil {
		return nil, err
	}
	return mutate.ConfigFile(image, r.configuration(image, architecture))
}

func (r recipe) configuration(image registry.Image, architecture string) *registry.ConfigFile {
	configuration, err := image.ConfigFile()
	if err != nil { // it was made a moment ago, in memory
		panic(err)
	}
	configuration = configuration.DeepCopy()
	configuration.OS, configuration.Architecture = "linux", architecture
	_, tag, _ := cutTag(r.name)
	configuration.Config = registry.Config{
		Entrypoint: []string{"/millrace"}, WorkingDir: "/", Env: []string{"PATH=/"},
		Labels: map[string]string{
			"org.opencontainers.image.title":    "millrace",
			"org.opencontainers.image.version":  tag,
			"org.opencontainers.image.licenses": "Apache-2.0 AND (MIT OR GPL-2.0-only)",
			"org.opencontainers.image.source":   "https://github.com/millrace/millrace",
		},
	}
	return configuration
}

// layer is the one layer, as a tar archive. There is no shell, no library and no
// user: what is not there needs no update.
func (r recipe) layer(binary string) ([]byte, error) {
	var archive bytes.Buffer
	out := tar.NewWriter(&archive)
	if err := add(out, "millrace", binary, 0o755); err != nil {
		return nil, err
	}
	texts := []string{"LICENSE", "NOTICE"}
	more, err := filepath.Glob(filepath.Join(r.licences, "LICENSES", "*"))
	if err != nil {
		return nil, err
	}
	for _, text := range more {
		texts = append(texts, filepath.Join("LICENSES", filepath.Base(text)))
	}
	for _, text := range texts {
		if err := add(out, "licences/"+filepath.ToSlash(text), filepath.Join(r.licences, text), 0o644); err != nil {
			return nil, err
		}
	}
	return archive.Bytes(), out.Close()
}

// add a file to an archive, without its time and owner.
func add(archive *tar.Writer, name, file string, mode int64) error {
	content, err := os.ReadFile(file)
	if err == nil {
		err = archive.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(content))})
	}
	if err == nil {
		_, err = archive.Write(content)
	}
	return err
}

// writeArchive writes the image as one file, in the layout of an OCI archive.
func writeArchive(index registry.ImageIndex, file, name, tag string) (err error) {
	folder, err := os.MkdirTemp(filepath.Dir(file), "image-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(folder)
	path, err := layout.Write(folder, empty.Index)
	if err != nil {
		return err
	}
	// containerd goes by the first, everybody else by the second.
	err = path.AppendIndex(index, layout.WithAnnotations(map[string]string{
		"io.containerd.image.name": name, "org.opencontainers.image.ref.name": tag,
	}))
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	archive := tar.NewWriter(out)
	names, err := filepath.Glob(filepath.Join(folder, "*"))
	if err != nil {
		return err
	}
	blobs, err := filepath.Glob(filepath.Join(folder, "blobs", "sha256", "*"))
	if err != nil {
		return err
	}
	names = slices.DeleteFunc(names, func(name string) bool { return filepath.Base(name) == "blobs" })
	for _, name := range append(names, blobs...) {
		inside, err := filepath.Rel(folder, name)
		if err == nil {
			err = add(archive, filepath.ToSlash(inside), name, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return archive.Close()
}

// placeholder is the image that the manifests name.
const placeholder = "image: millrace:TAG"

// withPods is the manifest of an agent that gives pods their network, too.
const withPods = "millrace-pods.yaml"

// forPods marks the lines of a manifest that are for the pod network alone.
const forPods = "# pods: "

// writeManifests writes what is applied: the rights and the agent as one file, once without
// and once with the pod network, and what takes everything away again as another, and what
// keeps settings of the nodes. All name the image.
func (r recipe) writeManifests() error {
	for to, from := range map[string][]string{
		"millrace.yaml":        {"rbac.yaml", "millrace.yaml"},
		withPods:               {"rbac.yaml", "millrace.yaml"},
		"millrace-remove.yaml": {"remove.yaml"},
		"millrace-tune.yaml":   {"tune.yaml"},
	} {
		var all []string
		for _, name := range from {
			content, err := os.ReadFile(filepath.Join(r.manifests, name))
			if err != nil {
				return err
			}
			all = append(all, strings.TrimSpace(string(content)))
		}
		manifest := strings.Join(all, "\n---\n") + "\n"
		if !strings.Contains(manifest, placeholder) {
			return fmt.Errorf("fill in %s: nothing in it says %q", to, placeholder)
		}
		if to == withPods {
			if !strings.Contains(manifest, forPods) {
				return fmt.Errorf("write %s: nothing in it says %q", to, forPods)
			}
			manifest = strings.ReplaceAll(manifest, forPods, "")
		}
		manifest = strings.ReplaceAll(manifest, placeholder, "image: "+r.name)
		if err := os.WriteFile(filepath.Join(r.to, to), []byte(manifest), 0o644); err != nil {
			return err
		}
	}
	return nil
}
